"""The training stage as the queue worker and the one-machine facade run it.

This process is the *supervisor*: it fetches what the job needs, has the engine process train, and
publishes what comes out. It never imports torch, so a fault in the model's process cannot take it
along, and its heartbeats are never held up by a computation.
"""

from __future__ import annotations

from pathlib import Path

from llamahome.config import Settings
from llamahome.errors import CorruptArtifact, NotFound, OperatorError
from llamahome.schemas import JobSpec, Ports, Stage, StageFunction, StageResult, StageTask, Step
from llamahome.training.publish import (
    assemble_report,
    close_output,
    complete_adapter,
    summarise,
)
from llamahome.training.supervisor import Session, WarmEngine
from llamahome.training.wire import Admit

_engine = WarmEngine()


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
    job = f"{task.job_id}.{task.run_id}.{task.fence}"
    with _engine.lease(settings, job) as line:  # first, so that it starts while the inputs come
        prepared = _folder(task, ports, Stage.preprocessing)
        validation = _folder(task, ports, Stage.validation)
        admit = Admit(
            job=job,
            spec=_with_absolute_base(task),
            data=str(prepared.resolve()),
            scratch=str(ports.scratch.resolve()),
            resume=tuple(str(folder.resolve()) for folder in _resume_folders(task, ports)),
            device=settings.device,
            threads=settings.threads,
            memory_bytes=settings.memory_bytes,
            tick_tokens=settings.tick_tokens,
        )
        done = Session(line, ports, settings).run(admit)
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
    _engine.shutdown()


def _folder(task: StageTask, ports: Ports, stage: Stage) -> Path:
    artifact = close_output(task, stage).artifact
    assert artifact is not None  # close_output has checked
    return ports.folder(artifact)


def _resume_folders(task: StageTask, ports: Ports) -> list[Path]:
    """The checkpoints that storage takes for whole, the newest first."""
    points = ([task.resume] if task.resume is not None else []) + list(task.earlier)
    folders = []
    for point in points:
        try:
            folders.append(ports.folder(point.artifact))
        except (CorruptArtifact, NotFound) as error:
            ports.event(
                f"The checkpoint of step {point.step} cannot be used: {error}", level="warn"
            )
    return folders


def _with_absolute_base(task: StageTask) -> JobSpec:
    base = task.spec.base
    absolute = base.model_copy(update={"path": str(Path(base.path).resolve())})
    return task.spec.model_copy(update={"base": absolute})
