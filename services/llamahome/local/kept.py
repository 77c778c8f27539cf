"""Which checkpoints of a run in one folder stay: the newest few, and the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llamahome.errors import CorruptArtifact, NotFound
from llamahome.schemas import CheckpointRef
from llamahome.storage import LocalStorage
from llamahome.storage.manifest import artifact_ref

_STATE = "state.json"  # of the training's checkpoints


class KeptCheckpoints:
    """The checkpoints in a storage, of this attempt and those before it, the oldest first."""

    def __init__(self, storage: LocalStorage, limit: int) -> None:
        """``limit`` as ``checkpointing.save_total_limit``."""
        self._storage, self._limit = storage, limit
        self._points: list[CheckpointRef] = []
        self._best: int | None = None

    def find(self, tell: Callable[[str], None]) -> int:
        """Take in what earlier attempts saved. Returns the number of the newest attempt, 0 if none.

        A checkpoint whose bytes are not what they were is told of and removed: going on from one
        before it only takes longer.
        """
        newest = 0
        for folder in sorted(self._storage.root.glob("jobs/*/runs/*/f*")):
            newest = max(newest, int(folder.name.removeprefix("f")))
            for saved in sorted(folder.glob("checkpoint-*")):
                self._take(saved, tell)
        self._points.sort(key=lambda point: point.step)
        if self._points:
            self._best = self._best_of(self._points[-1])
        return newest

    def _take(self, saved: Path, tell: Callable[[str], None]) -> None:
        path = saved.relative_to(self._storage.root).as_posix()
        step = int(saved.name.rpartition("-")[2])
        try:
            artifact = artifact_ref(self._storage.manifest(path), path)
            self._storage.fetch(artifact, saved)
        except (CorruptArtifact, NotFound) as error:
            tell(f"The checkpoint of step {step} is corrupt and is not used: {error}")
            self._storage.delete(path)
            return
        self._points.append(CheckpointRef(step=step, artifact=artifact))

    def _best_of(self, point: CheckpointRef) -> int | None:
        with self._storage.open(f"{point.artifact.path}/{_STATE}") as stream:
            best: int | None = json.load(stream)["state"]["stopping"]["best_step"]
        return best

    def newest_first(self) -> list[CheckpointRef]:
        return self._points[::-1]

    @property
    def newest_step(self) -> int:
        """0 where nothing is saved."""
        return self._points[-1].step if self._points else 0

    def add(self, point: CheckpointRef) -> None:
        """A checkpoint is durable: remove the oldest above the limit, but never the best."""
        self._points = [each for each in self._points if each.step != point.step] + [point]
        if point.best:
            self._best = point.step
        for old in self._points[:-1]:
            if len(self._points) <= self._limit:
                break
            if old.step != self._best:
                self._storage.delete(old.artifact.path)
                self._points.remove(old)
