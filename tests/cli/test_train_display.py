from __future__ import annotations

import io

from llamahome.cli.train_display import BarDisplay, PlainDisplay, display_for
from llamahome.schemas import NewEvent, Stage

FIGURES = {"loss": 2.345678, "tokens_per_second": 1234.5, "mfu": 0.412, "peak_memory_bytes": 2**31}
EVALUATION = NewEvent(message="Evaluation", kind="metrics", data={"step": 3, "eval_loss": 1.5})
STEP = NewEvent(message="Step 3/9", kind="metrics", data={"step": 3, "train_loss": 1.5})
REJECTED = NewEvent(
    message="The first rows that cannot be used", level="warn",
    data={"rows": [{"file": "a.jsonl", "line": 7, "reason": "no JSON\x1b[2J"}] * 9},
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_there_are_plain_lines_and_figures_only_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    display = PlainDisplay(stream, clock=lambda: now[0])
    with display:
        for event in (REJECTED, STEP, EVALUATION):
            display.event(Stage.training, event)
        for step in range(1, 10):
            now[0] += 4.0
            display.progress(Stage.training, step, 9, FIGURES)

    lines = stream.getvalue().splitlines()
    assert lines[0] == "training: warn: The first rows that cannot be used"
    assert lines[1:6] == ["training: warn: a.jsonl:7: no JSON?[2J"] * 5
    assert lines[6] == "training: Evaluation"
    assert lines[7:] == [
        f"training: {step}/9 ({share} %)  loss 2.346  tok/s 1234  MFU 0.41  memory 2.0 GiB"
        for step, share in ((3, 33), (6, 67), (9, 100))
    ]


def test_on_a_terminal_there_is_a_bar_that_is_gone_in_the_end() -> None:
    stream = Terminal()
    display = display_for(stream)
    assert isinstance(display, BarDisplay)
    with display:
        display.progress(Stage.validation, 1, None, {})
        display.event(Stage.training, EVALUATION)
        display.event(Stage.training, STEP)
        display.progress(Stage.training, 3, 9, FIGURES)

    shown = stream.getvalue()
    assert "Evaluation" in shown
    assert "Step 3/9" not in shown
    assert shown.endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back
