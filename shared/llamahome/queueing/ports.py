"""The world of one attempt in the fleet: shared storage behind, the ledger beside."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from llamahome.errors import Unavailable
from llamahome.ledger import Claim, Ledger
from llamahome.queueing.lease import LeaseKeeper
from llamahome.schemas import (
    ADOPTED_KINDS,
    ArtifactRef,
    CheckpointRef,
    FileRef,
    NewEvent,
    StopReason,
)
from llamahome.storage import Storage, layout

_LOG = structlog.get_logger(__name__)


class FleetPorts:
    """``schemas.Ports`` for a claimed run. Files go to storage, facts to the ledger."""

    def __init__(
        self,
        claim: Claim,
        *,
        key: str | None,
        ledger: Ledger,
        storage: Storage,
        lease: LeaseKeeper,
        scratch: Path,
    ) -> None:
        self._claim = claim
        self._key = key
        self._ledger = ledger
        self._storage = storage
        self._lease = lease
        self._scratch = scratch

    @property
    def scratch(self) -> Path:
        return self._scratch

    def open(self, file: FileRef) -> BinaryIO:
        return self._storage.open(file.path)

    def folder(self, artifact: ArtifactRef, only: Collection[str] | None = None) -> Path:
        into = self._scratch / "inputs" / artifact.digest
        return self._storage.fetch(artifact, into, only=only)

    def publish(self, folder: Path, kind: str) -> ArtifactRef:
        adopt = kind in ADOPTED_KINDS
        return self._storage.publish(folder, self._path(folder, kind), kind=kind, adopt=adopt)

    def _path(self, folder: Path, kind: str) -> str:
        """Attempts that may differ write under their own fence; equal ones under their key."""
        task = self._claim.task
        if kind == "checkpoint":
            return f"{layout.attempt_path(task.job_id, task.run_id, task.fence)}/{folder.name}"
        if kind == "adapter":
            return layout.model_path(task.job_id, task.fence)
        assert self._key is not None, f"a {kind} artifact needs a key"
        return layout.artifact_path(self._key)

    def checkpoint(self, point: CheckpointRef) -> None:
        """Move the resume pointer, then delete what the job's ``save_total_limit`` leaves over."""
        keep = int(self._claim.task.spec.config["checkpointing"]["save_total_limit"])
        for dropped in self._ledger.checkpoint(self._claim, point, keep=keep):
            try:
                self._storage.delete(dropped.artifact.path)
            except (Unavailable, OSError) as error:
                # The training must not end for want of a deletion; nothing names the files now.
                _LOG.warning("checkpoint not deleted", path=dropped.artifact.path, error=str(error))

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        self._lease.progress({"done": done, "total": total, "data": dict(data or {})})

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        body = dict(data or {})
        kind = "metrics" if "step" in body else "message"
        self._lease.event(
            NewEvent.model_validate(
                {"message": message, "level": level, "kind": kind, "data": body}
            )
        )

    def should_stop(self) -> StopReason | None:
        return self._lease.reason
