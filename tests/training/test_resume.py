from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import CorruptArtifact, Stopped
from llamahome.schemas import JobSpec, StopReason
from llamahome.training.checkpoints import load_checkpoint, prune_checkpoints
from llamahome.training.data import TokenData
from llamahome.training.ports import TrainedAdapter

pytestmark = pytest.mark.model

Run = Callable[..., tuple[Any, TrainedAdapter | None]]

# Dropout, a short last window, an evaluation off the epoch's grid, and 9 steps.
SETTINGS: dict[str, Any] = {"epochs": 3, "eval_steps": 4, "lr_scheduler": "cosine"}


def tree(folder: Path) -> dict[str, str]:
    """Every file's digest by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture
def run(
    make_spec: Callable[..., JobSpec], prepared_folder: Path, make_ports: Callable[..., Any]
) -> Run:
    """Train under a name; a stop gives no adapter."""
    from llamahome.training.loop import train
    from llamahome.training.runtime import Runtime

    data = TokenData.open(prepared_folder)

    def go(
        name: str,
        stop_at: dict[int, StopReason] | None = None,
        resume: Path | None = None,
        threads: int = 1,
        **changes: Any,
    ) -> tuple[Any, TrainedAdapter | None]:
        ports = make_ports(name, stop_at)
        spec = make_spec(**{**SETTINGS, **changes})
        runtime = Runtime("cpu", threads)
        if not stop_at:
            return ports, train(spec, data, ports, runtime=runtime, resume=resume)
        with pytest.raises(Stopped) as stopped:
            train(spec, data, ports, runtime=runtime, resume=resume)
        assert stopped.value.code in stop_at.values()
        return ports, None

    return go


def test_stopped_after_a_step_and_resumed_it_ends_with_the_same_bytes(run: Run) -> None:
    """BEHAVIOUR 73: resume gives the same steps and bytes."""
    _, undisturbed = run("undisturbed")
    assert undisturbed is not None

    for step in (1, 2, 4, 5, 7):
        first, nothing = run(f"stopped{step}", {step: StopReason.drain})
        assert nothing is None
        second, resumed = run(f"resumed{step}", resume=first.kept[step])

        assert resumed is not None
        assert tree(resumed.folder) == tree(undisturbed.folder), step
        assert resumed.report.resumed_from == (step,)
        assert resumed.report.fingerprint == undisturbed.report.fingerprint  # with the step ledger
        assert resumed.report.metrics == undisturbed.report.metrics
        assert resumed.report.trained_tokens == undisturbed.report.trained_tokens
        assert second.messages()[0] == f"Fine-tuning job resumed from step {step}"
        assert second.steps_seen[-1] == 9


def test_resumed_from_every_checkpoint_of_an_undisturbed_run_it_ends_with_the_same_bytes(
    run: Run,
) -> None:
    ports, undisturbed = run("undisturbed")
    assert undisturbed is not None
    assert sorted(ports.kept) == [3, 4, 6, 8, 9]

    for step, folder in ports.kept.items():
        _, resumed = run(f"from{step}", resume=folder)
        assert resumed is not None
        assert tree(resumed.folder) == tree(undisturbed.folder), step


def test_stopped_again_and_again_it_ends_with_the_same_bytes(run: Run) -> None:
    _, undisturbed = run("undisturbed")
    folder = None
    for step in (2, 4, 5, 8):
        ports, _ = run(f"until{step}", {step: StopReason.pause}, resume=folder)
        folder = ports.kept[step]

    _, resumed = run("last", resume=folder)

    assert undisturbed is not None
    assert resumed is not None
    assert tree(resumed.folder) == tree(undisturbed.folder)
    assert resumed.report.resumed_from == (2, 4, 5, 8)


def test_early_stopping_and_its_best_weights_survive_a_resume(run: Run) -> None:
    """BEHAVIOUR 71: its state survives a resume."""
    settings: dict[str, Any] = {
        "epochs": 40, "learning_rate": 0.3, "lr_scheduler": "constant", "max_grad_norm": 100.0,
        "early_stopping": {"patience": 2}, "eval_steps": None,
    }  # fmt: skip
    _, undisturbed = run("undisturbed", **settings)
    assert undisturbed is not None
    best, end = undisturbed.report.best_step, undisturbed.report.steps
    assert best is not None

    for step in sorted({best, best + 1, end - 1}):
        ports, _ = run(f"until{step}", {step: StopReason.drain}, **settings)
        _, resumed = run(f"from{step}", resume=ports.kept[step], **settings)
        assert resumed is not None
        assert tree(resumed.folder) == tree(undisturbed.folder), step
        assert resumed.report.stopped_early == undisturbed.report.stopped_early


def test_drained_in_the_middle_of_an_evaluation_it_makes_up_for_it(run: Run) -> None:
    _, undisturbed = run("undisturbed")
    assert undisturbed is not None
    first, _ = run("stopped", {4: StopReason.drain})  # found inside the evaluation after step 4
    assert load_checkpoint(first.kept[4]).state.evaluated_at != 4

    _, resumed = run("resumed", resume=first.kept[4])

    assert resumed is not None
    assert tree(resumed.folder) == tree(undisturbed.folder)


def test_a_resumed_run_keeps_the_number_of_threads_it_began_with(run: Run) -> None:
    first, _ = run("first", {2: StopReason.drain}, threads=1)

    second, resumed = run("second", resume=first.kept[2], threads=2)

    assert resumed is not None
    assert resumed.report.fingerprint["threads"] == 1
    assert second.messages("warn") == []


def test_another_environment_is_told_of(run: Run) -> None:
    first, _ = run("first", {2: StopReason.drain})
    state = first.kept[2] / "state.json"
    body = json.loads(state.read_text())
    body["fingerprint"]["torch"] = "0.1"
    state.write_text(json.dumps(body))

    second, _ = run("second", resume=first.kept[2])

    assert [message.split(":")[0] for message in second.messages("warn")] == [
        "Resumed under another torch"
    ]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "history.jsonl"])
def test_a_truncated_or_flipped_file_is_found(run: Run, name: str) -> None:
    first, _ = run("first", {2: StopReason.drain})
    path = first.kept[2] / name
    good = path.read_bytes()

    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
        path.write_bytes(bad)
        with pytest.raises(CorruptArtifact, match="differ"):
            load_checkpoint(first.kept[2])
    path.unlink()
    with pytest.raises(CorruptArtifact, match="unreadable"):
        load_checkpoint(first.kept[2])


def test_from_a_corrupt_checkpoint_it_starts_afresh_and_says_so(run: Run) -> None:
    _, undisturbed = run("undisturbed")
    first, _ = run("first", {2: StopReason.drain})
    (first.kept[2] / "optimizer.safetensors").write_bytes(b"")

    second, resumed = run("second", resume=first.kept[2])

    assert undisturbed is not None
    assert resumed is not None
    assert tree(resumed.folder) == tree(undisturbed.folder)
    assert resumed.report.resumed_from == ()
    assert "is corrupt, training starts afresh" in second.messages("warn")[0]


def test_a_torn_state_file_is_found(run: Run) -> None:
    first, _ = run("first", {2: StopReason.drain})
    state = first.kept[2] / "state.json"
    whole = state.read_bytes()

    for cut in range(0, len(whole) - 1, 97):
        state.write_bytes(whole[:cut])
        with pytest.raises(CorruptArtifact):
            load_checkpoint(first.kept[2])


def test_the_oldest_are_pruned_but_never_the_best_or_the_newest(tmp_path: Path) -> None:
    """BEHAVIOUR 73: save_total_limit, the best kept."""
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"checkpoint-{step:08d}").mkdir()

    prune_checkpoints(tmp_path, 2, best_step=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000002", "checkpoint-00000005",
    ]  # fmt: skip
    prune_checkpoints(tmp_path, 1, best_step=2)
    assert len(list(tmp_path.iterdir())) == 2
