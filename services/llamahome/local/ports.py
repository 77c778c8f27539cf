"""The world of one attempt in one process: storage behind, callbacks in front."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llamahome.errors import CorruptArtifact
from llamahome.schemas import (
    ADOPTED_KINDS,
    ArtifactRef,
    CheckpointRef,
    FileRef,
    NewEvent,
    StopReason,
)
from llamahome.storage import Storage

OnProgress = Callable[[int, int | None, Mapping[str, Any]], None]
OnEvent = Callable[[NewEvent], None]
ShouldStop = Callable[[], StopReason | None]


class LocalPorts:
    """``schemas.Ports`` without a ledger: events, checkpoints and progress stay in lists."""

    def __init__(
        self,
        storage: Storage,
        scratch: Path,
        prefix: str,
        *,
        on_progress: OnProgress | None = None,
        on_event: OnEvent | None = None,
        on_checkpoint: Callable[[CheckpointRef], None] | None = None,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """``scratch`` is made when missing; artifacts go below ``prefix``, named by their kind."""
        scratch.mkdir(parents=True, exist_ok=True)
        self._storage = storage
        self._scratch = scratch
        self._prefix = prefix
        self._on_progress = on_progress
        self._on_event = on_event
        self._on_checkpoint = on_checkpoint
        self._should_stop = should_stop
        self._fetched: dict[tuple[str, frozenset[str] | None], Path] = {}
        self.events: list[NewEvent] = []
        self.checkpoints: list[CheckpointRef] = []
        self.last_progress: tuple[int, int | None] | None = None

    @property
    def scratch(self) -> Path:
        return self._scratch

    def open(self, file: FileRef) -> BinaryIO:
        """Raises NotFound, Unavailable, and CorruptArtifact where the size is another."""
        size = self._storage.size(file.path)
        if size != file.bytes:
            raise CorruptArtifact(f"{size} bytes are stored, not {file.bytes}", file=file.filename)
        return self._storage.open(file.path)

    def folder(self, artifact: ArtifactRef, only: Collection[str] | None = None) -> Path:
        key = artifact.digest, None if only is None else frozenset(only)
        if key not in self._fetched:
            into = self._scratch / "inputs" / artifact.digest
            self._fetched[key] = self._storage.fetch(artifact, into, only=only)
        return self._fetched[key]

    def publish(self, folder: Path, kind: str) -> ArtifactRef:
        """Checkpoints keep their folder's name, for there are many of them."""
        name = folder.name if kind == "checkpoint" else kind
        path, adopt = f"{self._prefix}/{name}", kind in ADOPTED_KINDS
        return self._storage.publish(folder, path, kind=kind, adopt=adopt)

    def checkpoint(self, point: CheckpointRef) -> None:
        self.checkpoints.append(point)
        if self._on_checkpoint is not None:
            self._on_checkpoint(point)

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        self.last_progress = (done, total)
        if self._on_progress is not None:
            self._on_progress(done, total, dict(data or {}))

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        body = dict(data or {})
        kind = "metrics" if "step" in body else "message"
        event = NewEvent.model_validate(
            {"message": message, "level": level, "kind": kind, "data": body}
        )
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def should_stop(self) -> StopReason | None:
        return self._should_stop() if self._should_stop is not None else None
