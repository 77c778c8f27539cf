"""From the ledger's records to OpenAI's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llamahome.config import TrainingConfig, merge, resolve_training_config
from llamahome.errors import InvalidConfig
from llamahome.gateway import names
from llamahome.gateway.objects import (
    CheckpointMetrics,
    CheckpointObject,
    EventObject,
    FileObject,
    JobHyperparameters,
    JobObject,
    MethodObject,
    ModelObject,
    ProgressObject,
    SupervisedObject,
)
from llamahome.queueing.models import fine_tuned_name
from llamahome.schemas import (
    Base,
    CheckpointRef,
    Event,
    Job,
    JobState,
    JsonObject,
    Run,
    RunState,
    Stage,
    Step,
    StoredFile,
)

_STATUS = {
    JobState.accepted: "validating_files",
    JobState.validating: "validating_files",
    JobState.preparing: "queued",
}
_STAGE = {
    JobState.accepted: Stage.validation,
    JobState.validating: Stage.validation,
    JobState.preparing: Stage.preprocessing,
    JobState.queued: Stage.training,
    JobState.running: Stage.training,
}


class JobViews:
    """Makes job objects; one per answer, because it remembers the defaults it has read."""

    def __init__(self) -> None:
        self._rates: dict[str, float | None] = {}

    def job(self, job: Job, runs: Sequence[Run] = (), metrics: Iterable[Event] = ()) -> JobObject:
        """``runs`` fill in progress, stage and attempt; ``metrics`` (newest first) the finish."""
        spec = job.spec
        # Not validated anew: a job of an older release must be shown, whatever it was set to.
        config = merge(TrainingConfig().model_dump(mode="json"), spec.config, source=job.id)
        hyperparameters = self._hyperparameters(spec.base.name, config)
        stage = current_stage(job, runs)
        progress = _progress(stage, runs)
        return JobObject(
            id=job.id,
            created_at=int(job.created_at),
            finished_at=_seconds(job.finished_at),
            model=spec.adapter_name or spec.base.name,
            fine_tuned_model=fine_tuned_name(job) if job.state is JobState.succeeded else None,
            organization_id=job.tenant,
            status=_STATUS.get(job.state, str(job.state)),
            training_file=spec.training_files[0].id,
            validation_file=spec.validation_files[0].id if spec.validation_files else None,
            result_files=[],
            trained_tokens=job.result.get("trained_tokens"),
            error=job.error,
            hyperparameters=hyperparameters,
            method=MethodObject(supervised=SupervisedObject(hyperparameters=hyperparameters)),
            seed=config["seed"],
            estimated_finish=_finish(job, progress, metrics),
            integrations=[],
            metadata=spec.metadata or None,
            user_provided_suffix=spec.suffix,
            queue_position=job.queue_position,
            attempt=_attempt(stage, runs),
            x_state=job.state,
            x_stage=stage,
            x_progress=progress,
            x_config=spec.config,
            x_submission_id=_own_submission_id(job.submission_id),
            x_retry_of=job.retry_of,
            x_started_at=_seconds(job.started_at),
        )

    def _hyperparameters(self, base: str, config: JsonObject) -> JobHyperparameters:
        usual, rate = self._usual_rate(base), config["learning_rate"]
        lora = config["lora"]
        return JobHyperparameters(
            n_epochs=config["epochs"],
            batch_size=config["batch_size"],
            # Rounded, so that 5e-5 * 0.1 is shown as the 0.1 that was asked for.
            learning_rate_multiplier="auto" if usual is None else float(f"{rate / usual:.12g}"),
            learning_rate=rate,
            lora_r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["target_modules"],
        )

    def _usual_rate(self, base: str) -> float | None:
        """The learning rate that a multiplier of 1 means for this base; None while the operator's
        file is broken, for a job must be shown all the same."""
        if base not in self._rates:
            try:
                self._rates[base] = resolve_training_config(model_name=base).learning_rate
            except InvalidConfig:
                self._rates[base] = None
        return self._rates[base]


def current_stage(job: Job, runs: Sequence[Run]) -> Stage | None:
    """Where the job is, or where it ended short of its end; None when it succeeded."""
    if job.state is JobState.succeeded:
        return None
    if job.state in _STAGE:
        return _STAGE[job.state]
    unfinished = {run.stage for run in runs if run.state is not RunState.done}
    return next((stage for stage in Stage if stage in unfinished), None)


def _progress(stage: Stage | None, runs: Sequence[Run]) -> ProgressObject | None:
    mine = [run for run in runs if run.stage is stage]
    if stage is None or not mine:
        return None
    if stage is Stage.training:
        newest = mine[-1].progress
        done, total = newest.get("done") or 0, newest.get("total")
        return ProgressObject(stage=stage, done=done, total=total, data=newest.get("data") or {})
    shards = [run for run in mine if run.step is Step.shard]
    done = sum(run.state is RunState.done for run in shards)
    # The shards of preprocessing are known once validation has closed.
    return ProgressObject(stage=stage, done=done, total=len(shards) or None)


def _attempt(stage: Stage | None, runs: Sequence[Run]) -> int | None:
    """The highest attempt of the current stage; of the training when the job succeeded."""
    of = stage or Stage.training
    return max((len(run.attempts) for run in runs if run.stage is of), default=0) or None


def _finish(job: Job, progress: ProgressObject | None, metrics: Iterable[Event]) -> int | None:
    """Extrapolated from the pace between the oldest and the newest of ``metrics``."""
    if job.state is not JobState.running or progress is None or progress.total is None:
        return None
    points = [
        (event.created_at, event.data["step"])
        for event in metrics
        if event.kind == "metrics" and isinstance(event.data.get("step"), int)
    ]
    if len(points) < 2:
        return None
    (new_at, new_step), (old_at, old_step) = points[0], points[-1]
    if new_step <= old_step:  # it went back to a checkpoint in between
        return None
    seconds_per_step = (new_at - old_at) / (new_step - old_step)
    return int(new_at + seconds_per_step * max(0, progress.total - new_step))


def _own_submission_id(submission_id: str | None) -> str | None:
    made_here = (names.KEY_SUBMISSION_PREFIX, names.BODY_SUBMISSION_PREFIX)
    return None if submission_id is None or submission_id.startswith(made_here) else submission_id


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def file_object(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id, bytes=file.bytes, created_at=int(file.created_at), filename=file.filename,
        purpose=file.purpose,
    )  # fmt: skip


def event_object(event: Event) -> EventObject:
    return EventObject(
        id=f"{names.EVENT_ID_PREFIX}{event.seq}", created_at=int(event.created_at),
        level=event.level, message=event.message, type=event.kind, data=event.data,
    )  # fmt: skip


def checkpoint_object(job: Job, created_at: float, point: CheckpointRef) -> CheckpointObject:
    return CheckpointObject(
        # The digest names the bytes, so the id is the same on every gateway.
        id=f"ftckpt_{point.artifact.digest[:24]}",
        created_at=int(created_at),
        fine_tuned_model_checkpoint=f"{fine_tuned_name(job)}:ckpt-step-{point.step}",
        fine_tuning_job_id=job.id,
        step_number=point.step,
        metrics=CheckpointMetrics(step=point.step, full_valid_loss=point.eval_loss),
    )


def base_object(base: Base) -> ModelObject:
    return ModelObject(id=base.name, created=int(base.created_at), owned_by="llamahome")


def fine_tuned_object(job: Job) -> ModelObject:
    return ModelObject(
        id=fine_tuned_name(job), created=int(job.finished_at or job.created_at),
        owned_by=job.tenant, parent=job.spec.base.name,
    )  # fmt: skip
