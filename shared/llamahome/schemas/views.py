"""What the ledger answers about jobs, runs, attempts, files, bases and processes."""

from __future__ import annotations

from pydantic import Field

from llamahome.schemas.base import JsonObject, Schema
from llamahome.schemas.jobs import (
    ArtifactRef,
    AttemptOutcome,
    BaseRef,
    FileRef,
    JobSpec,
    JobState,
    RunState,
    Stage,
    Step,
)


class JobError(Schema):
    """Why a job failed. ``param`` names the field or file at fault."""

    code: str
    message: str
    param: str | None = None


class Job(Schema):
    """A job row. Times are Unix seconds by the ledger's clock."""

    id: str
    tenant: str
    kind: str
    submission_id: str | None
    spec: JobSpec
    state: JobState
    cancel_requested: bool
    pause_requested: bool
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: JobError | None
    adapter: ArtifactRef | None
    result: JsonObject
    retry_of: str | None = None
    queue_position: int | None = None


class Attempt(Schema):
    """One try of a run under one fence. Seconds are by the ledger's clock."""

    number: int = Field(ge=1)
    fence: int
    worker: str
    host: str
    pid: int
    queue_wait_seconds: float
    run_seconds: float | None
    outcome: AttemptOutcome | None
    error: JsonObject | None = None
    cached: bool = False


class Run(Schema):
    """A run row with its attempts, as ``llamahome show`` prints it."""

    id: str
    job_id: str
    stage: Stage
    step: Step
    shard: int
    state: RunState
    fence: int
    attempts_without_progress: int
    progress: JsonObject
    attempts: tuple[Attempt, ...] = ()


class Base(BaseRef):
    """A registered base model."""

    created_at: float


class StoredFile(FileRef):
    """An uploaded file."""

    tenant: str
    purpose: str
    created_at: float

    def ref(self) -> FileRef:
        return FileRef(
            id=self.id, filename=self.filename, path=self.path, sha256=self.sha256, bytes=self.bytes
        )


class Worker(Schema):
    """One process of the fleet, by its own heartbeat."""

    id: str
    role: str
    host: str
    pid: int
    state: str
    version: str
    started_at: float
    heartbeat_at: float
    heartbeat_age_seconds: float
    metrics_port: int | None
    slots: int
    holds: tuple[str, ...] = ()
    info: JsonObject = Field(default_factory=dict)


class ApiKey(Schema):
    """A new key, shown once: the ledger keeps its digest only."""

    id: str
    tenant: str
    key: str
