"""The training stage as the queue worker and the one-machine facade run it.

This process is the *supervisor*: it fetches what the job needs, has the engine process train, and
publishes what comes out. It never imports torch, so a fault in the model's process cannot take it
along, and its heartbeats are never held up by a computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llamahome.config import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, Settings
from llamahome.errors import CorruptArtifact, NotFound, OperatorError
from llamahome.schemas import (
    JobSpec,
    Ports,
    Stage,
    StageFunction,
    StageResult,
    StageTask,
    Step,
    TrainingReport,
)
from llamahome.training.publish import (
    assemble_report,
    close_output,
    complete_adapter,
    summarise,
)
from llamahome.training.supervisor import Session, WarmEngine
from llamahome.training.wire import Admit

_engine = WarmEngine()


def make_stage(settings: Settings, engine: WarmEngine = _engine) -> StageFunction:
    """The stage function of a process with these settings; it trains in ``engine``, by default the
    one that the whole process shares."""

    def stage(task: StageTask, ports: Ports) -> StageResult:
        return run(task, ports, settings, engine)

    return stage


def run(
    task: StageTask, ports: Ports, settings: Settings, engine: WarmEngine = _engine
) -> StageResult:
    """Train and publish the adapter of ``task``; resume from its checkpoint where it has one.

    Raises what the training raises (UserError kinds), WorkerLost (the engine died or stalled),
    Stopped and Fenced (asked to), Unavailable and OSError (storage). SystemExit and
    KeyboardInterrupt pass through after the engine has been given time to save.
    """
    if (task.stage, task.step) != (Stage.training, Step.train):
        raise OperatorError(f"the training stage has no step {task.stage}/{task.step}")
    job = f"{task.job_id}.{task.run_id}.{task.fence}"
    with engine.lease(settings, job) as line:  # first, so that it starts while the inputs come
        inputs = fetch_inputs(task, ports)
        done = Session(line, ports, settings).run(admission(task, ports, settings, inputs))
    return publish_result(task, ports, inputs, Path(done.folder), done.report)


class Inputs(NamedTuple):
    """The local folders of both close steps' artifacts."""

    prepared: Path
    validation: Path


def fetch_inputs(task: StageTask, ports: Ports) -> Inputs:
    """Raises OperatorError, CorruptArtifact, NotFound, Unavailable."""
    return Inputs(_folder(task, ports, Stage.preprocessing), _folder(task, ports, Stage.validation))


def admission(task: StageTask, ports: Ports, settings: Settings, inputs: Inputs) -> Admit:
    """What is to be trained, with all that it needs in local folders. Raises as fetching does."""
    return Admit(
        job=f"{task.job_id}.{task.run_id}.{task.fence}",
        spec=_with_absolute_base(task),
        data=str(inputs.prepared.resolve()),
        scratch=str(ports.scratch.resolve()),
        resume=tuple(str(folder.resolve()) for folder in _resume_folders(task, ports)),
        adapter=_earlier_adapter(task, ports),
        device=settings.device,
        threads=settings.threads,
        memory_bytes=settings.memory_bytes,
        tick_tokens=settings.tick_tokens,
    )


def publish_result(
    task: StageTask, ports: Ports, inputs: Inputs, folder: Path, training: TrainingReport
) -> StageResult:
    """Complete the adapter in ``folder`` with the reports of every stage, and publish it."""
    report = assemble_report(task, inputs.validation, inputs.prepared, training)
    complete_adapter(folder, task.spec, inputs.prepared, report)
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


def _earlier_adapter(task: StageTask, ports: Ports) -> str | None:
    if task.spec.adapter is None:
        return None
    files = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)  # and not a whole merged model
    return str(ports.folder(task.spec.adapter, only=files).resolve())


def _with_absolute_base(task: StageTask) -> JobSpec:
    base = task.spec.base
    absolute = base.model_copy(update={"path": str(Path(base.path).resolve())})
    return task.spec.model_copy(update={"base": absolute})
