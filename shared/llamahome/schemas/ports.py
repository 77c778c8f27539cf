"""All that a stage function may ask of the world around it.

The work modules know no queue, ledger or metrics object: they are functions of values plus these
few calls, so the queue workers, the one-machine facade and the tests run the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from llamahome.schemas.jobs import ArtifactRef, CheckpointRef, FileRef, StageResult, StageTask

# What a stage makes once and never touches again.
ADOPTED_KINDS = frozenset({"rows", "prepared"})


class StopReason(StrEnum):
    """Why the work should end at its next boundary."""

    cancel = "cancel"
    pause = "pause"
    drain = "drain"
    fenced = "fenced"


class Ports(Protocol):
    """The world of one attempt. Every method may be called from the stage's thread only."""

    @property
    def scratch(self) -> Path:
        """An empty local folder of this attempt; gone when the attempt ends."""
        ...

    def open(self, file: FileRef) -> BinaryIO:
        """A seekable stream of an uploaded file. Raises Unavailable or CorruptArtifact."""
        ...

    def folder(self, artifact: ArtifactRef, only: Collection[str] | None = None) -> Path:
        """A local folder with the artifact's verified files; read-only. Raises CorruptArtifact.

        ``only`` names the files that are needed; others are not verified and may be missing.
        """
        ...

    def publish(self, folder: Path, kind: str) -> ArtifactRef:
        """Make the folder's files durable under this run's key (manifest last) and return it.

        ``kind`` is rows, prepared, checkpoint or adapter. Those of ``ADOPTED_KINDS`` must never be
        written to again: the storage may keep the very files. Raises Unavailable, OSError.
        """
        ...

    def checkpoint(self, point: CheckpointRef) -> None:
        """Move the run's resume pointer to a published checkpoint. Raises Fenced."""
        ...

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        """Say how far the work is, in the stage's own unit (bytes, rows, optimizer steps).

        Cheap: only the newest is kept and sent at most once a second.
        """
        ...

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        """Append a line to the job's events (batched); ``data`` with ``step`` makes it metrics."""
        ...

    def should_stop(self) -> StopReason | None:
        """Ask at every boundary; on a reason, end by raising ``Stopped`` with it as the code."""
        ...


class StageFunction(Protocol):
    """A stage as the runner calls it."""

    def __call__(self, task: StageTask, ports: Ports) -> StageResult: ...


class StageKey(Protocol):
    """The digest of everything that decides a run's output; None where it is never reused."""

    def __call__(self, task: StageTask) -> str | None: ...
