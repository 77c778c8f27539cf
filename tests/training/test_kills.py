"""The engine killed, at random and at named places: in the end, the undisturbed run's bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Settings
from llamahome.errors import WorkerLost
from llamahome.schemas import CheckpointRef, StageResult, StageTask
from llamahome.training import make_stage, shutdown_engine
from support.processes import engine_processes

# In one group with the other tests of the one warm engine that a process has.
pytestmark = [pytest.mark.model, pytest.mark.xdist_group("engine")]

WEIGHTS = "adapter_model.safetensors"
# Dropout, accumulation, an evaluation off the epoch's grid, and a save after every step.
RUN: dict[str, Any] = {
    "epochs": 20, "eval_steps": 7, "early_stopping": {"enabled": False},
    "checkpointing": {"save_strategy": "steps", "save_steps": 1},
}  # fmt: skip
MakeTask = Callable[..., StageTask]
MakePorts = Callable[..., Any]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    yield Settings(scratch=tmp_path_factory.mktemp("engine"), threads=1, device="cpu")
    shutdown_engine()


@pytest.fixture(autouse=True)
def fresh_engine() -> Iterator[None]:
    """An engine takes what it inherits when it is started."""
    shutdown_engine()
    yield
    shutdown_engine()


def digest(result: StageResult) -> str:
    assert result.artifact is not None
    return hashlib.sha256((Path(result.artifact.path) / WEIGHTS).read_bytes()).hexdigest()


def ledger_of(result: StageResult) -> str:
    found: str = result.summary["report"]["training"]["fingerprint"]["step_ledger"]
    return found


def kill_engine() -> None:
    for engine in engine_processes():
        engine.send_signal(signal.SIGKILL)


class Killing:
    """Runs a job to its end, through as many lost engines as it takes."""

    def __init__(self, settings: Settings, make_task: MakeTask, make_ports: MakePorts) -> None:
        self._stage = make_stage(settings)
        self._make_task, self._make_ports = make_task, make_ports
        self.resumed_from: list[int] = []
        self.points: list[CheckpointRef] = []

    def run(self, arm: Callable[[Any], None], most: int, **settings: Any) -> StageResult:
        """``arm`` is given the ports of each attempt, of which there are at most ``most``."""
        for attempt in range(most):
            ports = self._make_ports(f"attempt-{attempt}-{id(self)}")
            arm(ports)
            newest = [point for point in reversed(self.points)]
            task = self._make_task(resume=newest[0] if newest else None, **RUN | settings)
            task = task.model_copy(update={"fence": attempt + 1, "earlier": tuple(newest[1:3])})
            self.resumed_from.append(newest[0].step if newest else 0)
            try:
                return self._stage(task, ports)
            except WorkerLost:
                self.points += ports.points
        raise AssertionError(f"not done after {most} attempts")


def undisturbed(
    settings: Settings, make_task: MakeTask, make_ports: MakePorts, **changes: Any
) -> StageResult:
    return make_stage(settings)(make_task(**RUN | changes), make_ports("undisturbed"))


@pytest.mark.parametrize(
    "kills", [3, pytest.param(25, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_killed_at_random_moments_it_ends_with_the_undisturbed_bytes(
    settings: Settings, make_task: MakeTask, make_ports: MakePorts, kills: int
) -> None:
    epochs = 10 * (kills + 1)  # of three steps each: far more than the kills let by
    expected = undisturbed(settings, make_task, make_ports, epochs=epochs)
    shutdown_engine()
    draw = random.Random(kills)
    killing = Killing(settings, make_task, make_ports)
    left = kills

    def arm(ports: Any) -> None:
        nonlocal left
        if not left:
            return
        left -= 1
        begun = draw.randint(1, 5)
        timer = threading.Timer(draw.uniform(0, 0.06), kill_engine)  # a step and a save take 0.03
        start = killing.points[-1].step if killing.points else 0

        def progress(done: int) -> None:
            if done >= start + begun and not timer.ident:
                timer.start()

        ports.on_progress = progress

    found = killing.run(arm, kills + 1, epochs=epochs)

    assert digest(found) == digest(expected)
    assert ledger_of(found) == ledger_of(expected)
    assert len(killing.resumed_from) == kills + 1, "an engine was done before it was killed"


@pytest.fixture
def few() -> dict[str, Any]:
    return {"epochs": 3}


@pytest.fixture(scope="module")
def whole() -> list[str]:
    """The undisturbed run's digest, once it is known."""
    return []


@pytest.mark.parametrize(
    "point", ["after_tmp_write", "after_manifest", "after_rename", "during_gc"]
)
@pytest.mark.parametrize("occurrence", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_at_a_named_place_of_a_save_it_ends_with_the_undisturbed_bytes(
    settings: Settings, make_task: MakeTask, make_ports: MakePorts, tmp_path: Path, point: str,
    occurrence: int, monkeypatch: pytest.MonkeyPatch, few: dict[str, Any], whole: list[str],
) -> None:  # fmt: skip
    """What a save leaves half-done is never taken for a checkpoint."""
    if not whole:
        whole.append(digest(make_stage(settings)(make_task(**RUN | few), make_ports("whole"))))
        shutdown_engine()
    flag = tmp_path / "crashed"
    monkeypatch.setenv("LLAMAHOME_CRASH_AT", f"{point}:{occurrence}@{flag}")
    killing = Killing(settings, make_task, make_ports)

    found = killing.run(lambda ports: None, 2, **few)

    assert flag.exists()
    assert len(killing.resumed_from) == 2
    assert [digest(found)] == whole


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(
    settings: Settings, make_task: MakeTask, make_ports: MakePorts
) -> None:
    """BEHAVIOUR 73: a corrupt newest checkpoint."""
    expected = undisturbed(settings, make_task, make_ports)
    killing = Killing(settings, make_task, make_ports)

    def arm(ports: Any) -> None:
        if not killing.points:
            ports.on_progress = lambda done: kill_engine() if done >= 6 else None

    def spoil(ports: Any) -> None:
        arm(ports)
        if killing.points:
            newest = Path(killing.points[-1].artifact.path) / "adapter.safetensors"
            newest.write_bytes(newest.read_bytes()[:-1])
            seen.append(ports)

    seen: list[Any] = []
    found = killing.run(spoil, 2)

    assert digest(found) == digest(expected)
    assert "the one before is tried" in seen[0].messages("warn")[0]
    assert found.summary["report"]["training"]["resumed_from"][-1] == killing.points[-2].step


def test_the_engine_hears_of_no_secret(
    settings: Settings, make_task: MakeTask, make_ports: MakePorts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_LEDGER_URL", "postgresql://user:secret@db/x")
    ports = make_ports("ports")
    seen: list[str] = []

    def look(done: int) -> None:
        for engine in engine_processes():
            seen.extend(engine.environ().values())

    ports.on_progress = look
    make_stage(settings)(make_task(), ports)

    assert seen
    assert not any("secret" in value for value in seen)
    assert os.environ["LLAMAHOME_LEDGER_URL"]
