"""What the training loop asks of the world, and what it hands back. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llamahome.schemas import StopReason, TrainingReport


@dataclasses.dataclass(frozen=True)
class LocalCheckpoint:
    """A complete checkpoint on local disk, ``step`` optimizer steps in.

    ``eval_loss`` is set where the weights were evaluated, ``best`` where they are the best so far.
    """

    folder: Path
    step: int
    eval_loss: float | None
    best: bool


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """The result: ``folder`` holds the adapter's weights, its config and the history."""

    folder: Path
    report: TrainingReport


class TrainPorts(Protocol):
    """The world of one training. Called from the training's thread only."""

    @property
    def scratch(self) -> Path:
        """A local folder: ``checkpoints/`` and ``adapter/`` are written below it."""
        ...

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        """Optimizer steps done, and the newest figures. Called at least once a micro-batch."""
        ...

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None: ...

    def checkpoint(self, point: LocalCheckpoint) -> Callable[[], bool] | None:
        """Make it durable. None where it is when this returns; else a function that says, later,
        whether it is. Until then the folder stays."""
        ...

    def should_stop(self) -> StopReason | None: ...
