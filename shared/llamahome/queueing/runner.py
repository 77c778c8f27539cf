"""The stage runner: everything that happens around a stage, once.

Claim, lease, scratch folder, cache, stage function, publish, commit, next doorbell, and what each
kind of error means for the run. The stage function knows none of it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from llamahome.config import Settings
from llamahome.errors import (
    CorruptArtifact,
    DamagedArtifact,
    Fenced,
    LlamaHomeError,
    NotFound,
    OperatorError,
    Stopped,
    Unavailable,
)
from llamahome.ledger import Claim, Ledger
from llamahome.queueing.doorbell import Bell
from llamahome.queueing.lease import LeaseKeeper
from llamahome.queueing.ports import FleetPorts
from llamahome.queueing.scratch import Scratch
from llamahome.schemas import NewEvent, Stage, StageFunction, StageKey, StageResult, StopReason
from llamahome.storage import Storage

_LOG = structlog.get_logger(__name__)


class StageRunner:
    """Works off one stage's ready runs, one at a time."""

    def __init__(
        self,
        stage: Stage,
        function: StageFunction,
        key: StageKey,
        *,
        ledger: Ledger,
        storage: Storage,
        bell: Bell,
        settings: Settings,
        worker: str,
    ) -> None:
        self._stage = stage
        self._function = function
        self._key = key
        self._ledger = ledger
        self._storage = storage
        self._bell = bell
        self._settings = settings
        self._worker = worker
        self._scratch = Scratch(settings.scratch_root)

    def work(self) -> int:
        """Claim and run until nothing is ready or ``claim_seconds`` have passed.

        In the second case the own queue is rung first, so that the rest is not left lying: the
        pause lets a worker that was asked to end do so between two runs. Returns the number of
        attempts made. Raises Unavailable as :meth:`claim` does.
        """
        until = time.monotonic() + self._settings.claim_seconds
        attempts = 0
        while (claim := self.claim()) is not None:
            self.attempt(claim)
            attempts += 1
            if time.monotonic() >= until:
                self._bell.ring(self._stage)
                break
        return attempts

    def claim(self, *, warm_base: str | None = None, beside: bool = False) -> Claim | None:
        """See :meth:`Ledger.claim`; what lost attempts left in the scratch folder goes first.

        Raises Unavailable also where nothing can be written there: a worker that cannot work must
        not spend the attempts of others' jobs.
        """
        self._scratch.sweep()
        self._scratch.check()
        return self._ledger.claim(
            self._stage,
            self._worker,
            host=self._settings.host,
            pid=os.getpid(),
            lease_seconds=self._settings.lease_seconds,
            warm_base=warm_base,
            beside=beside,
        )

    def attempt(self, claim: Claim, on_lease: Callable[[LeaseKeeper], None] | None = None) -> None:
        """Run it to its end, whatever that is; ``on_lease`` is handed the lease first.

        Raises SystemExit and KeyboardInterrupt, after handing the run back.
        """
        task = claim.task
        with structlog.contextvars.bound_contextvars(
            job=task.job_id,
            run=task.run_id,
            stage=str(task.stage),
            step=str(task.step),
            shard=task.shard,
            attempt=task.fence,
        ):
            try:
                with self._scratch.folder() as scratch:
                    self._guarded(claim, scratch, on_lease)
            except OSError as error:
                self._failed(claim, _from_os_error(error), [])

    def _guarded(
        self, claim: Claim, scratch: Path, on_lease: Callable[[LeaseKeeper], None] | None
    ) -> None:
        """Run the attempt and give every way it can end its meaning."""
        lease = LeaseKeeper(self._ledger, claim)
        unsent: list[NewEvent] = []
        try:
            try:
                with lease:
                    if on_lease is not None:
                        on_lease(lease)
                    key, result, cached = self._run(claim, lease, scratch)
            finally:
                # Only now: a renewal under way holds some, and gives them back where it fails.
                unsent = lease.take_events()
            self._complete(claim, result, key=key, cached=cached, events=unsent)
        except Stopped as stopped:
            self._stopped(claim, stopped, unsent)
        except DamagedArtifact as error:
            self._damaged(claim, error, unsent)
        except LlamaHomeError as error:
            self._failed(claim, error, unsent)
        except (SystemExit, KeyboardInterrupt):
            # The worker is being shut down: hand the run back, at no cost, before leaving.
            self._released(claim, StopReason.drain, unsent)
            raise
        except OSError as error:
            self._failed(claim, _from_os_error(error), unsent)
        except Exception as error:
            # The worker must outlive any mistake in a stage; the operator gets the traceback.
            _LOG.exception("stage failed with an unexpected error")
            self._failed(claim, OperatorError(f"{type(error).__name__}: {error}"), unsent)

    def _run(
        self, claim: Claim, lease: LeaseKeeper, scratch: Path
    ) -> tuple[str | None, StageResult, bool]:
        """(key, result, whether an earlier run had it)."""
        key = self._key(claim.task)
        kept = self._from_cache(claim, key) if key is not None else None
        if kept is not None:
            return key, kept, True
        ports = FleetPorts(
            claim, key=key, ledger=self._ledger, storage=self._storage, lease=lease,
            scratch=scratch,
        )  # fmt: skip
        return key, self._function(claim.task, ports), False

    def _complete(
        self,
        claim: Claim,
        result: StageResult,
        *,
        key: str | None,
        cached: bool,
        events: list[NewEvent],
    ) -> None:
        advanced = self._ledger.complete(claim, result, key=key, cached=cached, events=events)
        _LOG.info("run done", cached=cached, job_state=str(advanced.state))
        if advanced.stage is not None and advanced.ready:
            self._bell.ring(advanced.stage, count=advanced.ready)

    def _from_cache(self, claim: Claim, key: str) -> StageResult | None:
        """An equal run's result, if its artifact is still there and whole enough to be named."""
        result = self._ledger.cached(claim.tenant, key)
        if result is None or result.artifact is None:
            return result
        try:
            self._storage.manifest(result.artifact.path)
        except (NotFound, CorruptArtifact) as error:
            _LOG.warning("kept result dropped", error=str(error))
            self._ledger.forget(claim.tenant, key)
            return None
        return result

    def _stopped(self, claim: Claim, stopped: Stopped, unsent: list[NewEvent]) -> None:
        _LOG.info("run stopped", reason=stopped.code)
        if stopped.code in (StopReason.pause, StopReason.drain):
            self._released(claim, StopReason(stopped.code), unsent)
        # Cancelled or fenced: the run belongs to nobody or to another; there is nothing to write.

    def _released(self, claim: Claim, reason: StopReason, unsent: list[NewEvent]) -> None:
        self._tell(claim, unsent)
        try:
            self._ledger.release(claim, reason)
        except Unavailable as error:
            _LOG.warning("run not handed back; its lease will run out", error=str(error))
            return
        if reason is StopReason.drain:
            self._bell.ring(self._stage, recover=True)

    def _damaged(self, claim: Claim, error: DamagedArtifact, unsent: list[NewEvent]) -> None:
        """Have an earlier run of the job do its output again; of anything else it is a failure."""
        path = error.place.file
        outputs = [output.artifact for output in claim.task.inputs if output.artifact is not None]
        if path is None or path not in [output.path for output in outputs]:
            self._failed(claim, error, unsent)
            return
        _LOG.error("artifact damaged", path=path, error=str(error))
        self._tell(claim, unsent)
        try:
            advanced = self._ledger.rebuild(claim, path, error)
        except (Fenced, Unavailable) as problem:
            _LOG.warning("damaged artifact not forgotten", path=path, error=str(problem))
            return
        if advanced is None:
            self._failed(claim, error, [])
        elif advanced.stage is not None and advanced.ready:
            self._bell.ring(advanced.stage, count=advanced.ready)

    def _failed(self, claim: Claim, error: LlamaHomeError, unsent: list[NewEvent]) -> None:
        _LOG.warning("attempt failed", code=error.code, error=str(error))
        self._tell(claim, unsent)
        try:
            self._ledger.fail(claim, error, retry_seconds=self._settings.retry_seconds)
        except Fenced:
            _LOG.info("another attempt holds the run; the error is not recorded")
        except Unavailable as unavailable:
            _LOG.warning("error not recorded; the lease will run out", error=str(unavailable))

    def _tell(self, claim: Claim, unsent: list[NewEvent]) -> None:
        """What the stage said last stands in the ledger before what became of the attempt."""
        if not unsent:
            return
        try:
            self._ledger.renew(claim, events=unsent)
        except Exception:
            # How the attempt ended must be written, whatever the reason that these cannot be.
            _LOG.exception("the last events are lost", events=len(unsent))


def _from_os_error(error: OSError) -> LlamaHomeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(
            f"no space left for {error.filename or 'a file'}", code="disk_full",
            remedy="Free space in the scratch or storage folder; the run is tried again",
        )  # fmt: skip
    return OperatorError(f"{type(error).__name__}: {error}")
