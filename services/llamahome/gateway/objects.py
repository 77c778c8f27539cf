"""OpenAI's objects as they leave the gateway; fields of ours carry an ``x_`` or are its additions.

Times are whole Unix seconds.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from llamahome.schemas import JobError, JobState, JsonObject, Stage

T = TypeVar("T")


class Object(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class Listing(Object, Generic[T]):
    """A page. Clients go on with the last item's id as ``after`` while ``has_more``."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Object):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileObject(Object):
    """An upload. ``status`` is always processed: rows are checked by the job, not on arrival."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None


class ModelObject(Object):
    """A base or a fine-tuned model; ``parent`` is a fine-tuned model's base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = None


class JobHyperparameters(Object):
    """What is trained with. ``learning_rate_multiplier`` is relative to the base's configuration
    as it stands now; ``learning_rate`` is the number itself."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float | Literal["auto"]
    learning_rate: float
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str


class SupervisedObject(Object):
    hyperparameters: JobHyperparameters


class MethodObject(Object):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedObject


class ProgressObject(Object):
    """Shards for validation and preprocessing, optimizer steps for training."""

    stage: Stage
    done: int
    total: int | None
    data: JsonObject = Field(default_factory=dict)


class JobObject(Object):
    """OpenAI's ``fine_tuning.job``. ``x_progress``, ``attempt``, ``queue_position`` and
    ``estimated_finish`` are filled in for a single job, not in lists."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal[
        "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
    ]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    hyperparameters: JobHyperparameters
    method: MethodObject
    seed: int
    estimated_finish: int | None
    integrations: list[JsonObject]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    queue_position: int | None
    attempt: int | None
    x_state: JobState
    x_stage: Stage | None
    x_progress: ProgressObject | None
    x_config: JsonObject
    x_submission_id: str | None
    x_retry_of: str | None
    x_started_at: int | None


class EventObject(Object):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JsonObject


class CheckpointMetrics(Object):
    """``full_valid_loss`` is over the whole validation set, in nats per labelled token."""

    step: int
    full_valid_loss: float | None


class CheckpointObject(Object):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class ArtifactObject(Object):
    """One file of the adapter, to be had at ``.../artifacts/{name}``."""

    name: str
    bytes: int
    sha256: str


class ErrorBody(Object):
    """``code`` is stable and may be matched on; ``param`` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Object):
    error: ErrorBody


class Health(Object):
    status: Literal["ok"] = "ok"
