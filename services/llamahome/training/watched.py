"""The training stage in this very process, for those who watch it with callbacks.

There is no engine process between: a fault in the model's code is a fault of this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.config import Settings
from llamahome.schemas import (
    CheckpointRef,
    Ports,
    StageFunction,
    StageResult,
    StageTask,
    StopReason,
)
from llamahome.training.ports import LocalCheckpoint
from llamahome.training.stage import admission, fetch_inputs, publish_result

if TYPE_CHECKING:
    from llamahome.training.callbacks import Callback


def make_watched_stage(settings: Settings, callbacks: Sequence[Callback]) -> StageFunction:
    """A stage function like :func:`~llamahome.training.stage.make_stage`'s, with callbacks."""

    def stage(task: StageTask, ports: Ports) -> StageResult:
        from llamahome.training.data import TokenData
        from llamahome.training.loop import train
        from llamahome.training.runtime import Runtime

        inputs = fetch_inputs(task, ports)
        admit = admission(task, ports, settings, inputs)
        trained = train(
            admit.spec,
            TokenData.open(Path(admit.data)),
            _StagePorts(ports),
            runtime=Runtime(admit.device, admit.threads, admit.memory_bytes, admit.tick_tokens),
            resume=Path(admit.resume[0]) if admit.resume else None,
            adapter=Path(admit.adapter) if admit.adapter is not None else None,
            callbacks=callbacks,
        )
        return publish_result(task, ports, inputs, trained.folder, trained.report)

    return stage


class _StagePorts:
    """A stage's ports as the loop asks for them (``TrainPorts``)."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    @property
    def scratch(self) -> Path:
        return self._ports.scratch

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        self._ports.progress(done, total, data)

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        self._ports.event(message, level=level, data=data)

    def checkpoint(self, point: LocalCheckpoint) -> None:
        artifact = self._ports.publish(point.folder, "checkpoint")
        self._ports.checkpoint(
            CheckpointRef(
                step=point.step, artifact=artifact, eval_loss=point.eval_loss, best=point.best
            )
        )

    def should_stop(self) -> StopReason | None:
        return self._ports.should_stop()
