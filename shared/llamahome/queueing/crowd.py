"""Several runs of one stage at once in one worker: a training engine's slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from llamahome.config import Settings
from llamahome.errors import Unavailable
from llamahome.ledger import Claim
from llamahome.queueing.lease import LeaseKeeper
from llamahome.queueing.runner import StageRunner
from llamahome.schemas import StopReason

_LOG = structlog.get_logger(__name__)
_LOOK_SECONDS = 1.0  # a doorbell is not heard while runs are at work: the ledger is asked
_DRAIN_SLACK_SECONDS = 10.0  # beyond the engine's own, for handing the runs back


class Crowd:
    """Claims runs of one base while slots are free, and works on each in a thread of its own.

    Which base is warm decides what is claimed: see :meth:`Ledger.claim`. ``tell`` is given that
    base and the number of free slots whenever one of them changes.
    """

    def __init__(
        self,
        runner: StageRunner,
        slots: int,
        settings: Settings,
        tell: Callable[[str, int], None] = lambda base, free_slots: None,
    ) -> None:
        self._runner, self._slots, self._settings, self._tell = runner, slots, settings, tell
        self._changed = threading.Condition()
        self._running: dict[tuple[str, int], LeaseKeeper | None] = {}
        self._alone = False
        self._warm_base: str | None = None

    def work(self) -> int:
        """Until nothing is at work and nothing is ready. Returns the number of attempts made.

        Raises Unavailable when the ledger does not answer and nothing is at work; SystemExit and
        KeyboardInterrupt after the runs at work have been asked to save and were handed back.
        """
        attempts = 0
        try:
            while True:
                with self._changed:
                    idle = not self._running
                started = self._fill()
                attempts += started
                with self._changed:
                    # What could not go beside a run that has ended meanwhile is looked for again.
                    if not self._running and idle and not started:
                        return attempts
                    if self._running:
                        self._changed.wait(min(_LOOK_SECONDS, self._settings.lease_seconds / 3))
        except (SystemExit, KeyboardInterrupt):
            self._drain()
            raise

    def _fill(self) -> int:
        """Claim into every free slot. Returns how many there were to claim."""
        started = 0
        while (claim := self._claim()) is not None:
            with self._changed:
                self._running[claim.run_id, claim.fence] = None
            self._alone = claim.alone
            self._warm_base = claim.task.spec.base.name
            thread = threading.Thread(
                target=self._attempt, args=(claim,), name=f"run-{claim.run_id}", daemon=True
            )
            thread.start()
            started += 1
            self._tell_now()
        return started

    def _claim(self) -> Claim | None:
        with self._changed:
            busy = len(self._running)
        if busy and (self._alone or busy >= self._slots):
            return None
        try:
            return self._runner.claim(warm_base=self._warm_base, beside=busy > 0)
        except Unavailable as error:
            if not busy:
                raise
            _LOG.warning("cannot claim beside the runs at work", error=str(error))
            return None

    def _attempt(self, claim: Claim) -> None:
        def note(lease: LeaseKeeper) -> None:
            with self._changed:
                self._running[claim.run_id, claim.fence] = lease

        try:
            self._runner.attempt(claim, note)
        finally:
            with self._changed:
                del self._running[claim.run_id, claim.fence]
                self._changed.notify_all()
            self._tell_now()

    def _tell_now(self) -> None:
        with self._changed:
            free = self._slots - len(self._running)
        self._tell(self._warm_base or "", free)

    def _drain(self) -> None:
        """Ask every run at work to save and stop, and wait until it has been handed back."""
        deadline = time.monotonic() + self._settings.drain_seconds + _DRAIN_SLACK_SECONDS
        with self._changed:
            while self._running and (left := deadline - time.monotonic()) > 0:
                # Again and again: one that was just beginning has its lease only now.
                for lease in self._running.values():
                    if lease is not None:
                        lease.stop(StopReason.drain)
                self._changed.wait(min(left, 0.2))
        if self._running:
            _LOG.warning(
                "left with runs at work; their leases will run out", runs=len(self._running)
            )
