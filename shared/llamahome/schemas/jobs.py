"""A job as it is accepted, and the words for where it stands.

The states are ARCHITECTURE's own: a job is made of runs (stage x step x shard), a run is tried in
attempts, each attempt under one fence.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from llamahome.schemas.base import JsonObject, Schema

MAX_METADATA_PAIRS = 16


def _is_none(value: object) -> bool:
    return value is None


class Stage(StrEnum):
    """The three kinds of work, in their order."""

    validation = "validation"
    preprocessing = "preprocessing"
    training = "training"


class Step(StrEnum):
    """What a run does within its stage: one shard of many, or the close that needs them all."""

    shard = "shard"
    close = "close"
    train = "train"


class JobState(StrEnum):
    accepted = "accepted"
    validating = "validating"
    preparing = "preparing"
    queued = "queued"
    running = "running"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL_JOB_STATES


TERMINAL_JOB_STATES = frozenset({JobState.succeeded, JobState.failed, JobState.cancelled})


class RunState(StrEnum):
    blocked = "blocked"
    ready = "ready"
    running = "running"
    done = "done"
    failed = "failed"
    parked = "parked"
    cancelled = "cancelled"


class AttemptOutcome(StrEnum):
    """How one attempt ended; a run has one ``succeeded`` at most."""

    succeeded = "succeeded"
    failed = "failed"
    retried = "retried"
    lost = "lost"
    released = "released"
    cancelled = "cancelled"


class FileRef(Schema):
    """An immutable file on shared storage. ``path`` is relative to the storage root."""

    id: str
    filename: str
    path: str
    sha256: str
    bytes: int = Field(ge=0)


class BaseRef(Schema):
    """A base model as registered: the public name, and where its folder lies on the workers.

    ``digest`` is the sha256 over the folder's files, so that a changed base is never mistaken for
    the one the job was accepted with.
    """

    name: str
    path: str
    digest: str


class ArtifactRef(Schema):
    """A published folder. ``digest`` is the sha256 of its manifest; ``path`` is below the root."""

    digest: str
    path: str
    bytes: int = Field(ge=0)


class CheckpointRef(Schema):
    """A resume point: a published folder and the optimizer step after which it was taken."""

    step: int = Field(ge=0)
    artifact: ArtifactRef
    eval_loss: float | None = None
    best: bool = False


class JobSpec(Schema):
    """All that decides what is trained. Nothing here says where or when it runs.

    ``config`` is the effective training configuration (every key set, already validated by
    ``llamahome.config.TrainingConfig``), so that a later change of defaults cannot change a job
    that waits.
    ``adapter`` is the earlier adapter of the same base whose weights the training goes on from,
    ``adapter_name`` what it was asked for by.
    """

    tenant: str = Field(min_length=1, max_length=64)
    base: BaseRef
    training_files: tuple[FileRef, ...] = Field(min_length=1)
    validation_files: tuple[FileRef, ...] = ()
    config: JsonObject
    shard_bytes: int = Field(gt=0, description="validation works on byte ranges of this size")
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA_PAIRS)
    min_examples: int = Field(default=1, ge=1, description="fewer valid rows fail the job")
    # Left out where there is none, so that workers of an earlier release read the job.
    adapter: ArtifactRef | None = Field(default=None, exclude_if=_is_none)
    adapter_name: str | None = Field(default=None, exclude_if=_is_none)


class RunOutput(Schema):
    """What a finished run handed on: its artifact, and a small summary for those after it."""

    stage: Stage
    step: Step
    shard: int
    artifact: ArtifactRef | None
    summary: JsonObject


class StageTask(Schema):
    """One run as the stage function sees it: values only.

    ``plan`` is what the run was created with (a byte range, say); ``inputs`` are the outputs of
    the job's finished runs, in (stage, step, shard) order; ``resume`` is the newest accepted
    checkpoint, for training, and ``earlier`` are those before it that are kept, newest first.
    """

    job_id: str
    run_id: str
    fence: int
    stage: Stage
    step: Step
    shard: int
    spec: JobSpec
    plan: JsonObject
    inputs: tuple[RunOutput, ...] = ()
    resume: CheckpointRef | None = None
    earlier: tuple[CheckpointRef, ...] = ()

    def outputs_of(self, stage: Stage, step: Step) -> tuple[RunOutput, ...]:
        return tuple(out for out in self.inputs if out.stage == stage and out.step == step)


class StageResult(Schema):
    """What a stage function returns.

    ``summary`` is small JSON for the stages after it, the report and the events;
    ``next_plans`` is set by a close step: one plan per shard of the next stage.
    """

    artifact: ArtifactRef | None = None
    summary: JsonObject = Field(default_factory=dict)
    next_plans: tuple[JsonObject, ...] = ()
