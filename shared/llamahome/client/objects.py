"""What the gateway answers, as the client hands it on: frozen, and tolerant of new fields."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from llamahome.schemas import JobError, JobState, JsonObject, Stage


class Info(BaseModel):
    """A newer gateway may send more than this client knows, so unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Progress(Info):
    """How far the current stage is: shards for validation and preprocessing, optimizer steps for
    training. ``data`` holds the stage's newest numbers (losses, tokens a second)."""

    stage: Stage
    done: int
    total: int | None = None
    data: JsonObject = Field(default_factory=dict)


class JobInfo(Info):
    """A job. Times are Unix seconds; ``status`` is OpenAI's word for ``state``.

    ``config`` is the effective training configuration; ``queue_position`` 1 is next.
    """

    id: str
    model: str
    state: JobState = Field(validation_alias=AliasChoices("x_state", "state"))
    status: str
    stage: Stage | None = Field(default=None, validation_alias=AliasChoices("x_stage", "stage"))
    created_at: int
    started_at: int | None = Field(
        default=None, validation_alias=AliasChoices("x_started_at", "started_at")
    )
    finished_at: int | None = None
    error: JobError | None = None
    fine_tuned_model: str | None = None
    training_file: str
    validation_file: str | None = None
    queue_position: int | None = None
    attempt: int | None = None
    progress: Progress | None = Field(
        default=None, validation_alias=AliasChoices("x_progress", "progress")
    )
    config: JsonObject = Field(
        default_factory=dict, validation_alias=AliasChoices("x_config", "config")
    )
    metadata: dict[str, str] | None = None
    submission_id: str | None = Field(
        default=None, validation_alias=AliasChoices("x_submission_id", "submission_id")
    )
    retry_of: str | None = Field(
        default=None, validation_alias=AliasChoices("x_retry_of", "retry_of")
    )
    trained_tokens: int | None = None

    @property
    def terminal(self) -> bool:
        """Whether the job has ended; a terminal state never changes."""
        return self.state.terminal


class EventInfo(Info):
    """One line of a job's story. ``data`` holds numbers where ``type`` is metrics."""

    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: JsonObject | None = None


class StoredFileInfo(Info):
    """An uploaded file; ``bytes`` is its size."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int


class ModelInfo(Info):
    """A base model, or one of the tenant's fine-tuned models, whose ``parent`` is its base."""

    id: str
    created: int
    owned_by: str
    parent: str | None = None


class ArtifactInfo(Info):
    """One file of a published adapter."""

    name: str
    bytes: int
    sha256: str
