"""The training stage as the queue worker and the one-machine facade run it.

This process is the *supervisor*: it fetches what the job needs, has the engine process train, and
publishes what comes out. It never imports torch, so a fault in the model's process cannot take it
along, and its heartbeats are never held up by a computation.
"""

from __future__ import annotations

from pathlib import Path

from llamahome.config import Settings
from llamahome.errors import CorruptArtifact, OperatorError
from llamahome.schemas import JobSpec, Ports, Stage, StageFunction, StageResult, StageTask, Step
from llamahome.training.publish import (
    assemble_report,
    close_output,
    complete_adapter,
    summarise,
)
from llamahome.training.supervisor import EngineSlot, Session
from llamahome.training.wire import Admit

_slot = EngineSlot()


def make_stage(settings: Settings) -> StageFunction:
    """The stage function of a process with these settings."""

    def stage(task: StageTask, ports: Ports) -> StageResult:
        return run(task, ports, settings)

    return stage


def run(task: StageTask, ports: Ports, settings: Settings) -> StageResult:
    """Train and publish the adapter of ``task``; resume from its checkpoint where it has one.

    Raises what the training raises (UserError kinds), WorkerLost (the engine died or stalled),
    Stopped and Fenced (asked to), Unavailable and OSError (storage). SystemExit and
    KeyboardInterrupt pass through after the engine has been given time to save.
    """
    if (task.stage, task.step) != (Stage.training, Step.train):
        raise OperatorError(f"the training stage has no step {task.stage}/{task.step}")
    with _slot.lease(settings) as engine:  # first, so that it starts while the inputs come
        prepared = _folder(task, ports, Stage.preprocessing)
        validation = _folder(task, ports, Stage.validation)
        resume = _resume_folder(task, ports)
        admit = Admit(
            job_id=task.job_id,
            spec=_with_absolute_base(task),
            data=str(prepared.resolve()),
            scratch=str(ports.scratch.resolve()),
            resume=str(resume.resolve()) if resume is not None else None,
            device=settings.device,
            threads=settings.threads,
        )
        done = Session(engine, ports, settings).run(admit)
    report = assemble_report(task, validation, prepared, done.report)
    folder = Path(done.folder)
    complete_adapter(folder, task.spec, prepared, report)
    return StageResult(artifact=ports.publish(folder, "adapter"), summary=summarise(report))


def key(task: StageTask) -> str | None:
    """None: a training is never reused.

    The result holds the job's own report, and bit equality is promised on one kind of machine
    only, so an adapter found under a key would not surely be the one this fleet would train.
    """
    return None


def shutdown_engine() -> None:
    """End this process's warm engine."""
    _slot.shutdown()


def _folder(task: StageTask, ports: Ports, stage: Stage) -> Path:
    artifact = close_output(task, stage).artifact
    assert artifact is not None  # close_output has checked
    return ports.folder(artifact)


def _resume_folder(task: StageTask, ports: Ports) -> Path | None:
    if task.resume is None:
        return None
    try:
        return ports.folder(task.resume.artifact)
    except CorruptArtifact as error:
        # As the loop does with one that storage takes for whole.
        ports.event(f"The checkpoint is corrupt, training starts afresh: {error}", level="warn")
        return None


def _with_absolute_base(task: StageTask) -> JobSpec:
    base = task.spec.base
    absolute = base.model_copy(update={"path": str(Path(base.path).resolve())})
    return task.spec.model_copy(update={"base": absolute})
