"""``ProgressCallback``: SPEC.md's columns, driven by a real Trainer and by the facade's relay."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch.utils.data import IterableDataset

from llamahome.config import parse_training_config
from llamahome.local import bars
from llamahome.schemas import Stage

pytestmark = pytest.mark.model


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal would be sent."""
    out = io.StringIO()
    monkeypatch.setattr(
        bars, "progress_console", lambda: Console(file=out, force_terminal=True, width=120)
    )
    return out


def new_callback() -> Any:
    from llamahome.local import ProgressCallback

    return ProgressCallback()


def state(step: int, steps: int = 6, epochs: int = 3, *, main: bool = True) -> Any:
    from transformers import TrainerState

    return TrainerState(
        global_step=step, max_steps=steps, num_train_epochs=epochs, is_world_process_zero=main
    )


ARGS = SimpleNamespace(gradient_accumulation_steps=2)


def figures(callback: Any) -> list[tuple[float, float | None]]:
    return [(task.completed, task.total) for task in callback.progress.tasks]


class Endless(IterableDataset[Any]):
    """Rows without a length."""

    def __init__(self, row: Any) -> None:
        self._row = row

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self._row)


def trained_with(callback: Any, folder: Path, *others: Any, rows: Any = 4, **changes: Any) -> Any:
    """A real Trainer of transformers: 4 rows, batches of 1, steps of 2, 3 epochs."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    )  # fmt: skip
    row = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    wanted = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, **changes}
    given = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, **wanted,
    )  # fmt: skip
    data = Endless(row) if rows is None else [row] * rows
    trainer = Trainer(model, given, train_dataset=data, callbacks=[callback, *others])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def test_it_is_a_trainer_callback_with_spec_s_four_columns() -> None:
    """BEHAVIOUR 72: a TrainerCallback, made without arguments, with the four columns in order."""
    from transformers import TrainerCallback

    callback = new_callback()
    assert isinstance(callback, TrainerCallback)
    columns = [type(column) for column in callback.progress.columns]
    assert columns == [SpinnerColumn, TextColumn, BarColumn, TimeRemainingColumn]
    assert callback.progress.columns[1].text_format == "[progress.description]{task.description}"


def test_a_real_trainer_fills_both_bars(screen: io.StringIO, tmp_path: Path) -> None:
    """BEHAVIOUR 72: total = max_steps, the epoch's total = steps per epoch; epochs, steps, batches
    and the loss are shown; it ends at 100 % and has stopped."""
    callback = new_callback()
    trainer = trained_with(callback, tmp_path)
    assert trainer.state.max_steps == 6
    assert figures(callback) == [(6, 6), (2, 2)]
    overall, epoch = callback.progress.tasks
    assert overall.description.startswith("Training: step 6/6 of 3 epochs, loss ")
    assert epoch.description == "Epoch 3/3: step 2/2, batch 4"
    assert callback.progress.finished
    assert not callback.progress.live.is_started
    assert "100%" in screen.getvalue() or "0:00:00" in screen.getvalue()


def test_the_epoch_s_bar_begins_again_with_each_epoch(screen: io.StringIO) -> None:
    """BEHAVIOUR 72: it resets, and counts the batches of a step."""
    callback = new_callback()
    callback.on_train_begin(ARGS, state(0), None)
    callback.on_epoch_begin(ARGS, state(0), None)
    callback.on_substep_end(ARGS, state(0), None)
    assert callback.progress.tasks[1].description == "Epoch 1/3: step 0/2, batch 1"
    callback.on_step_end(ARGS, state(1), None)
    callback.on_step_end(ARGS, state(2), None)
    assert figures(callback) == [(2, 6), (2, 2)]
    callback.on_epoch_begin(ARGS, state(2), None)
    assert figures(callback) == [(2, 6), (0, 2)]
    assert callback.progress.tasks[1].description == "Epoch 2/3: step 0/2, batch 0"
    callback.close()


EPOCHS: list[tuple[dict[str, Any], list[str]]] = [
    # 5 batches are 3 steps, the last of one batch.
    ({"rows": 5, "max_steps": 7},
     ["Epoch 1/3: step 3/3, batch 5", "Epoch 2/3: step 3/3, batch 5",
      "Epoch 3/3: step 1/1, batch 2"]),
    ({"rows": 20, "max_steps": 12},
     ["Epoch 1/2: step 10/10, batch 20", "Epoch 2/2: step 2/2, batch 4"]),
    ({"rows": 20, "num_train_epochs": 1.5},
     ["Epoch 1/2: step 10/10, batch 20", "Epoch 2/2: step 5/5, batch 10"]),
    ({"rows": 6, "num_train_epochs": 0.5}, ["Epoch 1/1: step 2/2, batch 4"]),
    ({"rows": None, "max_steps": 3}, ["Epoch 1/1: step 3/3, batch 6"]),
]  # fmt: skip


@pytest.mark.parametrize(("run", "ends"), EPOCHS)
def test_each_epoch_s_bar_is_as_long_as_the_trainer_s_epoch(
    screen: io.StringIO, tmp_path: Path, run: dict[str, Any], ends: list[str]
) -> None:
    """BEHAVIOUR 72: also where the last one is not a whole one, or nobody knows how long one is."""
    from transformers import TrainerCallback

    seen: list[tuple[int, str, bool]] = []
    callback = new_callback()

    class Looks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            epoch = callback.progress.tasks[1]
            seen.append((state.global_step, epoch.description, epoch.completed == epoch.total))

    trainer = trained_with(callback, tmp_path, Looks(), **run)
    assert [text for _, text, full in seen if full] == ends
    assert figures(callback)[0] == (trainer.state.max_steps,) * 2


def test_an_epoch_that_a_callback_cuts_short_is_followed_by_the_next(
    screen: io.StringIO, tmp_path: Path
) -> None:
    """BEHAVIOUR 72: the next epoch's bar begins at 0, whatever was left of the one before."""
    from transformers import TrainerCallback

    begun: list[str] = []
    callback = new_callback()

    class Cuts(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(callback.progress.tasks[1].description)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_epoch_stop = state.global_step == 1
            return control

    trained_with(callback, tmp_path, Cuts(), rows=6)
    assert begun == [f"Epoch {n}/3: step 0/3, batch 0" for n in (1, 2, 3)]


def test_a_resumed_run_begins_where_it_was(screen: io.StringIO) -> None:
    """BEHAVIOUR 72: resume starts at global_step, in the middle of an epoch too."""
    callback = new_callback()
    callback.on_train_begin(ARGS, state(3), None)
    assert figures(callback) == [(3, 6), (1, 2)]
    callback.on_epoch_begin(ARGS, state(3), None)
    assert figures(callback) == [(3, 6), (1, 2)]
    assert callback.progress.tasks[1].description == "Epoch 2/3: step 1/2, batch 2"
    callback.close()


def test_it_stops_where_training_does(screen: io.StringIO, tmp_path: Path) -> None:
    """BEHAVIOUR 72: after an early stop, and after an exception, the terminal is given back."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = True
            return control

    class Breaks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            raise RuntimeError("broken")

    early = new_callback()
    trained_with(early, tmp_path, Ends())
    assert figures(early)[0] == (1, 6)
    assert not early.progress.live.is_started

    broken = new_callback()

    def break_in_a_block() -> None:
        with broken:
            trained_with(broken, tmp_path, Breaks())

    with pytest.raises(RuntimeError, match="broken"):
        break_in_a_block()
    assert broken.progress.tasks
    assert not broken.progress.live.is_started


def test_other_processes_and_other_places_are_quiet(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """BEHAVIOUR 72: nothing from a process that is not the main one, nothing off a terminal."""
    other = new_callback()
    other.on_train_begin(ARGS, state(0, main=False), None)
    other.on_epoch_begin(ARGS, state(0, main=False), None)
    other.on_step_end(ARGS, state(1, main=False), None)
    other.on_train_end(ARGS, state(6, main=False), None)
    assert figures(other) == []
    assert screen.getvalue() == ""
    plain = io.StringIO()
    monkeypatch.setattr(bars, "progress_console", lambda: Console(file=plain))
    callback = new_callback()
    trained_with(callback, tmp_path)
    assert plain.getvalue() == ""
    assert figures(callback) == [(6, 6), (2, 2)]


def test_the_facade_relays_a_training_in_another_process(screen: io.StringIO) -> None:
    """BEHAVIOUR 72: what the engine's process reports moves the same bars, also after a restart
    from a checkpoint; leaving the block stops them."""
    config = parse_training_config({"epochs": 3}, source="test")
    with bars.training_watch(config, lambda: None) as watch:
        assert watch.progress is not None
        callback: Any = watch.progress.__self__._callback  # type: ignore[attr-defined]
        watch.progress(Stage.validation, 5, 5, {})
        assert figures(callback) == []
        for done in (0, 0, 1, 3, 3):
            watch.progress(Stage.training, done, 6, {"loss": 1.5} if done else {})
        assert figures(callback) == [(3, 6), (1, 2)]
        assert "loss 1.5000" in callback.progress.tasks[0].description
        watch.progress(Stage.training, 2, 6, {})
        assert figures(callback) == [(2, 6), (0, 2)]
        watch.progress(Stage.training, 6, 6, {})
        assert figures(callback) == [(6, 6), (2, 2)]
    assert not callback.progress.live.is_started

    def lose_the_engine() -> None:
        nonlocal callback
        with bars.training_watch(config, lambda: None) as watch:
            assert watch.progress is not None
            callback = watch.progress.__self__._callback  # type: ignore[attr-defined]
            watch.progress(Stage.training, 1, 6, {})
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lose_the_engine()
    assert figures(callback)[0] == (1, 6)
    assert not callback.progress.live.is_started
