"""Checkpoints written by a thread while the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from llamahome.training.checkpoints import Snapshot, prune_checkpoints, save_checkpoint
from llamahome.training.ports import LocalCheckpoint, TrainPorts


class Saver:
    """One job's saves, one at a time. ``wake`` is called, in another thread, after each."""

    def __init__(self, ports: TrainPorts, executor: Executor, wake: Callable[[], None]) -> None:
        self._ports, self._executor, self.wake = ports, executor, wake
        self._writing: Future[Path] | None = None
        self._snapshot: Snapshot | None = None
        self._keep = 1
        self._is_durable: Callable[[], bool] | None = None

    def save(self, snapshot: Snapshot, keep: int) -> None:
        """Begin to write; the one before must have :meth:`settled`. ``keep`` as in the config."""
        assert self._snapshot is None, "one save at a time"
        self._snapshot, self._keep = snapshot, keep
        root = self._ports.scratch / "checkpoints"
        self._writing = self._executor.submit(save_checkpoint, root, snapshot)
        self._writing.add_done_callback(lambda _: self.wake())

    def abandon(self) -> None:
        """Give up a save that has not begun, and wait for one that has: once the job has its
        answer, its scratch folder is removed."""
        if self._writing is not None and not self._writing.cancel():
            wait([self._writing])

    def settled(self) -> bool:
        """True once everything is durable; called between ticks, it moves a save along.

        Raises OSError where it could not be written, and what ``ports.checkpoint`` raises.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return True
        if self._writing is not None:
            if not self._writing.done():
                return False
            writing, self._writing = self._writing, None
            self._is_durable = self._hand_on(writing.result(), snapshot)
        if self._is_durable is not None and not self._is_durable():
            return False
        self._snapshot = None
        root = self._ports.scratch / "checkpoints"
        prune_checkpoints(root, self._keep, snapshot.state.stopping.best_step)
        return True

    def _hand_on(self, folder: Path, snapshot: Snapshot) -> Callable[[], bool] | None:
        state = snapshot.state
        evaluated = state.evaluated_at == state.step
        best = state.stopping.best_step == state.step
        return self._ports.checkpoint(
            LocalCheckpoint(folder, state.step, state.eval_loss if evaluated else None, best)
        )
