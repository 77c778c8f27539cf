"""The values that cross a process border: frozen pydantic models, strict about unknown keys."""

from llamahome.schemas.base import JsonObject, Schema
from llamahome.schemas.events import Event, NewEvent
from llamahome.schemas.jobs import (
    TERMINAL_JOB_STATES,
    ArtifactRef,
    AttemptOutcome,
    BaseRef,
    CheckpointRef,
    FileRef,
    JobSpec,
    JobState,
    RunOutput,
    RunState,
    Stage,
    StageResult,
    StageTask,
    Step,
)
from llamahome.schemas.manifests import MANIFEST_NAME, Manifest, ManifestEntry
from llamahome.schemas.messages import Doorbell, SubmitMessage
from llamahome.schemas.metrics import TrainingMetrics
from llamahome.schemas.ports import Ports, StageFunction, StageKey, StopReason
from llamahome.schemas.reports import (
    FileCounts,
    JobReport,
    PackingCounts,
    PreparationReport,
    Rejected,
    SplitCounts,
    TrainingReport,
    TruncatedRow,
    ValidationReport,
)
from llamahome.schemas.views import ApiKey, Attempt, Base, Job, JobError, Run, StoredFile, Worker

__all__ = [
    "MANIFEST_NAME",
    "TERMINAL_JOB_STATES",
    "ApiKey",
    "ArtifactRef",
    "Attempt",
    "AttemptOutcome",
    "Base",
    "BaseRef",
    "CheckpointRef",
    "Doorbell",
    "Event",
    "FileCounts",
    "FileRef",
    "Job",
    "JobError",
    "JobReport",
    "JobSpec",
    "JobState",
    "JsonObject",
    "Manifest",
    "ManifestEntry",
    "NewEvent",
    "PackingCounts",
    "Ports",
    "PreparationReport",
    "Rejected",
    "Run",
    "RunOutput",
    "RunState",
    "Schema",
    "SplitCounts",
    "Stage",
    "StageFunction",
    "StageKey",
    "StageResult",
    "StageTask",
    "Step",
    "StopReason",
    "StoredFile",
    "SubmitMessage",
    "TrainingMetrics",
    "TrainingReport",
    "TruncatedRow",
    "ValidationReport",
    "Worker",
]
