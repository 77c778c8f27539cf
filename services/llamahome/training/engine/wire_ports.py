"""One job's ports, spoken over the engine's channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from llamahome.schemas import StopReason
from llamahome.training.ports import LocalCheckpoint
from llamahome.training.wire import Channel, Progress, Said, Saved

_BEAT_SECONDS = 0.1


class WirePorts:
    """``TrainPorts`` that end at the supervisor. ``stop`` and ``stored`` are what it has said."""

    def __init__(self, channel: Channel, job: str, scratch: Path) -> None:
        self._channel, self._job = channel, job
        self._sent = (-1, 0.0)  # steps done, monotonic seconds
        self.scratch = scratch
        self.stop: StopReason | None = None
        self.stored: set[int] = set()

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        step, at = self._sent
        if done == step and time.monotonic() - at < _BEAT_SECONDS:
            return
        self._sent = (done, time.monotonic())
        self._channel.send(Progress(job=self._job, done=done, total=total, data=dict(data or {})))

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        known = cast(Literal["info", "warn", "error"], level)
        self._channel.send(Said(job=self._job, message=message, level=known, data=dict(data or {})))

    def checkpoint(self, point: LocalCheckpoint) -> Callable[[], bool]:
        self.stored.discard(point.step)
        self._channel.send(
            Saved(
                job=self._job,
                folder=str(point.folder),
                step=point.step,
                eval_loss=point.eval_loss,
                best=point.best,
            )
        )
        return lambda: point.step in self.stored

    def should_stop(self) -> StopReason | None:
        return self.stop
