"""What one optimizer step did."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class StepTaken:
    """What a step did. ``loss`` is its mean per labelled token, ``grad_norm`` before clipping."""

    samples: list[int]
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    labelled: int

    @property
    def finite(self) -> bool:
        """False where the step was skipped: neither weights nor moments have changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)
