"""What each stage proves about its work. Every total is checked here, in code."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from llamahome.schemas.base import JsonObject, Schema
from llamahome.schemas.metrics import TrainingMetrics


def _is_none(value: object) -> bool:
    return value is None


class Rejected(Schema):
    """One row that cannot be used. ``line`` is 1-based, ``index`` the message's place in it."""

    file: str
    line: int = Field(ge=1)
    code: str
    reason: str
    index: int | None = None


class FileCounts(Schema):
    """One file's rows: ``total = valid + sum(invalid)``; blank lines are not rows."""

    file: str
    total: int = 0
    valid: int = 0
    blank: int = 0
    invalid: dict[str, int] = Field(default_factory=dict)
    format: str | None = Field(default=None, description="messages, sharegpt, alpaca, ...")
    container: str | None = Field(default=None, description="jsonl, jsonl.gz, json, parquet, ...")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        bad = sum(self.invalid.values())
        if self.total != self.valid + bad:
            raise ValueError(
                f"{self.file}: {self.total} rows, but {self.valid} valid + {bad} invalid"
            )
        return self


class ValidationReport(Schema):
    """Rows in = valid + invalid, per file and in all; duplicates are counted among the valid."""

    files: tuple[FileCounts, ...]
    total: int
    valid: int
    invalid: dict[str, int]
    duplicates: int
    leaked: int = Field(
        default=0, description="validation rows that also stand in the training files"
    )
    examples: tuple[Rejected, ...] = Field(default=(), description="the first rejected rows")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        bad = sum(self.invalid.values())
        if self.total != self.valid + bad:
            raise ValueError(f"{self.total} rows, but {self.valid} valid + {bad} invalid")
        if self.total != sum(counts.total for counts in self.files):
            raise ValueError(f"{self.total} rows, but the files hold another number")
        return self


class SplitCounts(Schema):
    """One side of the split: ``tokens`` is every token kept, ``trained_tokens`` the labelled."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0


class TruncatedRow(Schema):
    """A row that was cut: ``tokens`` before, of which the first ``kept`` remain."""

    file: str
    line: int
    tokens: int
    kept: int


class PackingCounts(Schema):
    """The plan over the training rows: packs of at most ``capacity`` tokens, ``fill`` in 0..1."""

    packs: int
    capacity: int
    fill: float


class MarkerTokens(Schema):
    """The tokens of ``template: markers``; those that the base did not have need new embeddings."""

    ids: dict[str, int] = Field(description="every marker's id, in the tokenizer of the data")
    added_tokens: dict[str, int] = Field(description="the ids of the markers new to the base")
    base_vocabulary: int = Field(description="ids of the base's tokenizer; new ones start here")
    base_embeddings: int | None = Field(
        default=None, description="rows of the base's embeddings, where its config says"
    )
    not_servable_by_vllm: str | None = Field(
        default=None, description="why; null where no token was added"
    )


class PreparationReport(Schema):
    """Rows in = training + validation + dropped by reason + duplicates dropped; residual 0."""

    rows_in: int
    training: SplitCounts
    validation: SplitCounts
    dropped: dict[str, int] = Field(default_factory=dict)
    duplicates_dropped: int = 0
    leaked: int = Field(
        default=0,
        description="validation rows whose tokens are those of a training row: rows may differ in "
        "what their template does not write",
    )
    truncated_rows: int = 0
    truncated_tokens: int = 0
    control_tokens_neutralised: int = 0
    stop_token_trained_share: float | None = None
    path: str = Field(
        default="template",
        description="how rows became tokens: fast; or shapes or template, with the reason",
    )
    slow_rows: int = Field(
        default=0, description="rows kept that the fast path left to the template, row by row"
    )
    masks_agreed: int = Field(
        default=0, description="rows kept whose mask was derived twice, with one result"
    )
    truncated_examples: tuple[TruncatedRow, ...] = ()
    packing: PackingCounts | None = None
    markers: MarkerTokens | None = Field(
        default=None, description="with template: markers only", exclude_if=_is_none
    )

    @property
    def residual(self) -> int:
        kept = self.training.rows + self.validation.rows
        return self.rows_in - kept - sum(self.dropped.values()) - self.duplicates_dropped

    @model_validator(mode="after")
    def _residual_is_zero(self) -> Self:
        if self.residual != 0:
            raise ValueError(f"{self.rows_in} rows in leave a residual of {self.residual}")
        return self


class TrainingReport(Schema):
    """What the training did; losses are mean cross-entropy per labelled token, in nats."""

    steps: int
    epochs: int
    seed: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    best_step: int | None = None
    best_eval_loss: float | None = None
    stopped_early: str | None = None
    trained_tokens: int
    trainable_parameters: int
    base_unchanged: bool
    adapter_moved: bool
    resumed_from: tuple[int, ...] = ()
    precision: str
    mode: str
    metrics: TrainingMetrics
    proofs: JsonObject = Field(
        default_factory=dict,
        description="factoring: the same rows as other micro-batches; first_step_moved: every part "
        "of the adapter; isolation: packed against alone; merge: the adapter on its base "
        "against the merged files",
    )
    fingerprint: JsonObject = Field(default_factory=dict)


class JobReport(Schema):
    """Saved with the adapter and answered by ``llamahome show``."""

    job_id: str
    base: str
    validation: ValidationReport
    preparation: PreparationReport
    training: TrainingReport
    lineage: dict[str, str] = Field(
        description="digests: data, base, tokenizer, template, config, code; "
        "adapter where an earlier one was gone on from"
    )
