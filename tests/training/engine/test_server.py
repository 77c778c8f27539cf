"""The engine process's side of the talk, in this process: what it says to a supervisor that answers
at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.schemas import BaseRef, JobSpec, StopReason
from llamahome.storage.bases import base_digest
from llamahome.training.wire import Admit, Done, Failed, Halted, Said, Saved, Stop, Stored

pytestmark = pytest.mark.model

JOBS: dict[str, dict[str, Any]] = {
    "a": {"seed": 1},
    "b": {"seed": 2, "batch_size": 1, "lora": {"r": 8}},
}


class Supervisor:
    """A channel whose other end stores what it is given, and keeps the rest in ``said``."""

    def __init__(self, spec: Callable[..., JobSpec], data: Path, scratch: Path) -> None:
        from llamahome.training.engine.__main__ import _Server

        self._spec, self._data, self._scratch = spec, data, scratch
        self.said: list[Any] = []
        self.server = _Server(self)  # type: ignore[arg-type]

    def send(self, message: Any) -> None:
        self.said.append(message)
        if isinstance(message, Saved):
            stored = Stored(job=message.job, step=message.step)
            self.server._inbox.put(lambda: self.server._hear(stored))

    def admit(self, job: str, base: BaseRef | None = None, **settings: Any) -> None:
        scratch = self._scratch / job
        scratch.mkdir(parents=True)
        spec = self._spec(**settings)
        if base is not None:
            spec = spec.model_copy(update={"base": base})
        self.server._hear(
            Admit(
                job=job, spec=spec, data=str(self._data), scratch=str(scratch), device="cpu",
                threads=1,
            )
        )  # fmt: skip

    def turn(self, times: int) -> None:
        for _ in range(times):
            self.server._turn()

    def run(self) -> dict[str, Any]:
        """Until every job has its answer; those by the job."""
        while self.server._busy or self.server._waiting:
            self.server._turn()
        answers = [one for one in self.said if isinstance(one, Done | Failed | Halted)]
        assert len({one.job for one in answers}) == len(answers), "one answer each"
        return {one.job: one for one in answers}

    def close(self) -> None:
        if self.server._engine is not None:
            self.server._engine.close()


@pytest.fixture
def make_supervisor(
    make_spec: Callable[..., JobSpec], prepared_folder: Path, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Callable[[str], Supervisor]:  # fmt: skip
    def make(name: str = "one") -> Supervisor:
        made = Supervisor(make_spec, prepared_folder, tmp_path / name)
        request.addfinalizer(made.close)
        return made

    return make


def adapter_bytes(answer: Any) -> bytes:
    assert isinstance(answer, Done), answer
    return (Path(answer.folder) / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def alone(make_supervisor: Callable[[str], Supervisor]) -> Callable[[str], bytes]:
    """The bytes of one of JOBS by itself."""

    def run(job: str) -> bytes:
        supervisor = make_supervisor(f"alone-{job}")
        supervisor.admit(job, **JOBS[job])
        return adapter_bytes(supervisor.run()[job])

    return run


def no_room(*_: Any, **__: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 160.00 MiB")


def test_jobs_that_wait_for_another_base_go_side_by_side_when_it_is_loaded(
    make_supervisor: Callable[..., Supervisor],
    base_folder: Path,
    tmp_path: Path,
    alone: Callable[[str], bytes],
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "other")
    other = BaseRef(name="test/other", path=str(folder), digest=base_digest(folder))
    supervisor = make_supervisor()
    supervisor.admit("first", other)
    for job, settings in JOBS.items():
        supervisor.admit(job, **settings)
    assert supervisor.server._engine is not None
    assert len(supervisor.server._engine.slots()) == 1

    together = 0
    while supervisor.server._busy or supervisor.server._waiting:
        supervisor.turn(1)
        together = max(together, len(supervisor.server._engine.slots()))

    assert together == 2
    answers = supervisor.run()
    assert isinstance(answers["first"], Done)
    for job in JOBS:
        assert adapter_bytes(answers[job]) == alone(job)


def test_one_that_does_not_fit_beside_others_is_admitted_when_they_have_ended(
    make_supervisor: Callable[..., Supervisor],
    alone: Callable[[str], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llamahome.training.engine import job as job_module

    supervisor = make_supervisor()
    supervisor.admit("a", **JOBS["a"])
    with monkeypatch.context() as short:
        short.setattr(job_module, "SlotOptimizer", no_room)
        supervisor.admit("b", **JOBS["b"])
    answers = supervisor.run()

    assert [one.job for one in supervisor.said if isinstance(one, Said) and "waits" in one.message]
    for name in JOBS:
        assert adapter_bytes(answers[name]) == alone(name)


@pytest.mark.parametrize("place", ["check", "step"])
def test_one_that_runs_out_of_memory_beside_others_goes_on_alone_from_its_last_checkpoint(
    make_supervisor: Callable[..., Supervisor],
    alone: Callable[[str], bytes],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    supervisor = make_supervisor()
    supervisor.admit("a", **JOBS["a"])
    supervisor.admit("b", **JOBS["b"])
    engine = supervisor.server._engine
    assert engine is not None
    (victim,) = [one.job for one in engine._jobs if one.job.config.seed == 2]
    if place == "check":
        monkeypatch.setattr(victim.slot, "keep_gradient", no_room)
    else:
        step, taken = victim.optimizer.step, []

        def run_out(*values: Any) -> float:
            taken.append(True)
            if len(taken) == 9:  # of 12, with checkpoints after 6 and 12
                no_room()
            return step(*values)

        monkeypatch.setattr(victim.optimizer, "step", run_out)
    answers = supervisor.run()

    for job in JOBS:
        assert adapter_bytes(answers[job]) == alone(job)
    assert answers["b"].report.resumed_from == ((6,) if place == "step" else ())


def test_one_that_lacks_memory_with_nobody_beside_it_fails(
    make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.training.engine import job as job_module

    supervisor = make_supervisor()
    monkeypatch.setattr(job_module, "write_result", no_room)
    for job in JOBS:
        supervisor.admit(job, **JOBS[job])
    answers = supervisor.run()

    assert {one.error["code"] for one in answers.values()} == {"out_of_memory"}


def test_one_that_waits_for_memory_can_be_stopped(
    make_supervisor: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.training.engine import job as job_module

    supervisor = make_supervisor()
    supervisor.admit("a", **JOBS["a"])
    with monkeypatch.context() as short:
        short.setattr(job_module, "SlotOptimizer", no_room)
        supervisor.admit("b", **JOBS["b"])
    supervisor.server._hear(Stop(job="b", reason=StopReason.cancel))
    answers = supervisor.run()

    assert isinstance(answers["b"], Halted)
    assert isinstance(answers["a"], Done)
