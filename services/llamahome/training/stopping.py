"""Early stopping, and which weights are best."""

from __future__ import annotations

import dataclasses
import math

from llamahome.config import TrainingConfig


@dataclasses.dataclass
class EarlyStopping:
    """Told of each evaluation in turn; part of every checkpoint.

    The *reference* moves only on an improvement greater than ``min_delta`` (as in Keras and
    Lightning), so slow gains that add up reset the counter; exactly ``min_delta`` does not. The
    *best* is simply the lowest loss, the earlier one of two equals. A loss that is not finite is
    no improvement. The evaluation before training is not told: there, nothing has been learned.
    """

    reference: float | None = None
    without_improvement: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    reason: str | None = None

    def update(self, loss: float, step: int, config: TrainingConfig) -> bool:
        """Take an evaluation after ``step``; True where its weights are the best so far."""
        settings = config.early_stopping
        finite = math.isfinite(loss)
        best = finite and (self.best_loss is None or loss < self.best_loss)
        if best:
            self.best_loss, self.best_step = loss, step
        if finite and (self.reference is None or _gained(self.reference, loss, settings.min_delta)):
            self.reference, self.without_improvement = loss, 0
            return best
        self.without_improvement += 1
        waited = self.without_improvement >= settings.patience
        if settings.enabled and waited and self.reason is None:
            shown = "none" if self.reference is None else f"{self.reference:.4f}"
            self.reason = (
                f"no improvement greater than {settings.min_delta:g} on {shown} in "
                f"{self.without_improvement} evaluations, at step {step}"
            )
        return best


def _gained(reference: float, loss: float, min_delta: float) -> bool:
    # 1.00 - 0.99 is 0.010000000000000009 in binary: exactly min_delta must not count as more.
    return reference - loss - min_delta > 1e-9 * max(1.0, abs(reference))
