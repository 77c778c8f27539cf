"""The clock of the fleet: every ``sweep_seconds`` whatever stands still is moved again."""

from __future__ import annotations

import threading

import structlog

from llamahome.config import Settings
from llamahome.errors import Unavailable
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import Bell

_LOG = structlog.get_logger(__name__)


class Sweeper:
    """Level-triggered, so any number may run, and one that dies leaves nothing behind."""

    def __init__(self, ledger: Ledger, bell: Bell, settings: Settings) -> None:
        self._ledger = ledger
        self._bell = bell
        self._settings = settings

    def sweep(self) -> int:
        """One round; returns how many runs were rung for. Raises Unavailable."""
        rings = self._ledger.sweep(rering_seconds=self._settings.rering_seconds)
        for ring in rings:
            self._bell.ring(ring.stage, count=ring.runs, recover=ring.recover)
        return sum(ring.runs for ring in rings)

    def run(self, stop: threading.Event) -> None:
        """Sweep until told to stop; whatever a round fails of, more follow."""
        while not stop.is_set():
            try:
                self.sweep()
            except Unavailable as error:
                _LOG.warning("sweep skipped", error=str(error))
            except Exception:
                # Without a sweeper lost doorbells stay lost: it outlives any mistake of a round.
                _LOG.exception("sweep failed")
            stop.wait(self._settings.sweep_seconds)
