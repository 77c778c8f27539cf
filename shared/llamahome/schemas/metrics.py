"""The five numbers of a training step that are saved with every model."""

from __future__ import annotations

from pydantic import Field

from llamahome.schemas.base import Schema


class TrainingMetrics(Schema):
    """``metrics/<run>.json``: the last step trained. Non-finite numbers are written as null."""

    train_loss: float | None
    eval_loss: float | None
    learning_rate: float
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
