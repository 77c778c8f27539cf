"""The seam for those who watch a training from inside: what they are told, and may ask for."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from llamahome.training.checkpoints import TrainState
from llamahome.training.schedule import Due
from llamahome.training.steps import StepTaken


class Watcher(Protocol):
    """Told of each moment of one run, in its thread, between two passes.

    What it raises ends the run. It may look at everything, and changes the result only by what it
    asks for: through what :meth:`step_end` and :meth:`epoch_end` return, ``stop`` (why the run is
    to end here; None to go on) and ``leaves_epoch`` (no further step of this epoch).
    """

    @property
    def wants_saves_done(self) -> bool:
        """Whether the run waits for a checkpoint before it tells of it."""
        ...

    @property
    def stop(self) -> str | None: ...

    @property
    def leaves_epoch(self) -> bool: ...

    def train_begin(self, state: TrainState) -> None: ...

    def step_begin(self, state: TrainState) -> None:
        """Before each step; the first of an epoch begins the epoch as well."""
        ...

    def micro_batch_end(self) -> None:
        """After each micro-batch of a step but its last."""
        ...

    def before_optimizer(self) -> None:
        """The gradient is clipped; the weights are as before."""
        ...

    def after_optimizer(self) -> None:
        """The weights have moved; the gradient is still there."""
        ...

    def step_end(self, state: TrainState, taken: StepTaken, due: Due) -> Due: ...

    def epoch_end(self, state: TrainState, due: Due) -> Due: ...

    def evaluation_batch(self) -> None: ...

    def evaluated(self, state: TrainState, loss: float, seconds: float) -> None: ...

    def saved(self, state: TrainState) -> None: ...

    def train_end(self, state: TrainState) -> None:
        """All is done and written. Not called where the run failed or was stopped from outside."""
        ...


@dataclasses.dataclass(frozen=True)
class Nobody:
    """Watches nothing and asks for nothing."""

    wants_saves_done: bool = False
    stop: str | None = None
    leaves_epoch: bool = False

    def train_begin(self, state: TrainState) -> None: ...

    def step_begin(self, state: TrainState) -> None: ...

    def micro_batch_end(self) -> None: ...

    def before_optimizer(self) -> None: ...

    def after_optimizer(self) -> None: ...

    def step_end(self, state: TrainState, taken: StepTaken, due: Due) -> Due:
        return due

    def epoch_end(self, state: TrainState, due: Due) -> Due:
        return due

    def evaluation_batch(self) -> None: ...

    def evaluated(self, state: TrainState, loss: float, seconds: float) -> None: ...

    def saved(self, state: TrainState) -> None: ...

    def train_end(self, state: TrainState) -> None: ...


NOBODY = Nobody()
