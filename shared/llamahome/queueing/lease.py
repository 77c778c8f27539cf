"""Keeping a lease alive while a stage works, and hearing through it when to stop."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import structlog

from llamahome.errors import Unavailable
from llamahome.ledger import Claim, Ledger
from llamahome.schemas import JsonObject, NewEvent, StopReason

FLUSH_SECONDS = 1.0
# A worker that could not renew for this share of its lease must assume that it has lost it.
SELF_FENCE_SHARE = 0.8
_LOG = structlog.get_logger(__name__)


class LeaseKeeper:
    """Renews a claim every third of its lease, and at most once a second when there is news.

    A renewal that failed is tried again a second later, whatever the reason was; until one
    succeeds the lease grows old, and the attempt is told to stop before it ends. Time is this
    process's monotonic clock: no step of the wall clock can make a lease look valid.
    """

    def __init__(self, ledger: Ledger, claim: Claim) -> None:
        self._ledger = ledger
        self._claim = claim
        self._condition = threading.Condition()
        self._progress: JsonObject | None = None
        self._events: list[NewEvent] = []
        self._reason: StopReason | None = None
        self._done = False
        self._behind = False
        self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._condition:
            self._done = True
            self._condition.notify()
        self._thread.join()

    @property
    def reason(self) -> StopReason | None:
        """Why to stop, as far as is known; losing the lease is noticed here without the ledger."""
        with self._condition:
            if self._reason is None and self._overdue():
                self._reason = StopReason.fenced
            return self._reason

    def stop(self, reason: StopReason) -> None:
        """Have the attempt stop for a reason of this process's own; one already known stands."""
        with self._condition:
            if self._reason is None:
                self._reason = reason

    def progress(self, value: JsonObject) -> None:
        with self._condition:
            self._progress = value
            self._condition.notify()

    def event(self, new: NewEvent) -> None:
        with self._condition:
            self._events.append(new)
            self._condition.notify()

    def take_events(self) -> list[NewEvent]:
        """What has not been sent yet, for the transaction that ends the attempt."""
        with self._condition:
            events, self._events = self._events, []
            return events

    def _overdue(self) -> bool:
        waited = time.monotonic() - self._renewed_at
        return waited > SELF_FENCE_SHARE * self._claim.lease_seconds

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._due, timeout=self._claim.lease_seconds / 3)
                if self._done:
                    return
                progress, self._progress = self._progress, None
                events, self._events = self._events, []
            self._renew(progress, events)
            with self._condition:
                # News in the next second waits; only the end of the attempt does not.
                if self._condition.wait_for(lambda: self._done, timeout=self._pause_seconds()):
                    return

    def _pause_seconds(self) -> float:
        return min(FLUSH_SECONDS, self._claim.lease_seconds / 3)

    def _due(self) -> bool:
        return self._done or self._behind or self._progress is not None or bool(self._events)

    def _renew(self, progress: JsonObject | None, events: list[NewEvent]) -> None:
        began = time.monotonic()
        try:
            reason = self._ledger.renew(self._claim, progress=progress, events=events)
        except Unavailable as error:
            _LOG.warning("lease not renewed", error=str(error))
            with self._condition:
                self._behind = True
                self._events[:0] = events
                if self._progress is None:
                    self._progress = progress
            return
        except Exception:
            # The news may be what cannot be written, and the lease matters more: they are let go.
            _LOG.exception("lease not renewed; the news with it are lost", events=len(events))
            with self._condition:
                self._behind = True
            return
        with self._condition:
            self._behind = False
            self._renewed_at = began
            if reason is not None:
                self._reason = reason
