"""The coordinator's process: sweeper and exporter. Run as many copies as you like."""

from __future__ import annotations

import signal
import threading

import structlog

from llamahome.config import Settings
from llamahome.config.logs import configure_logging
from llamahome.coordinator.exporter import FleetCollector, targets_page
from llamahome.coordinator.sweeper import Sweeper
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import CeleryBell
from llamahome.queueing.presence import Presence

_LOG = structlog.get_logger(__name__)


def main(settings: Settings) -> int:
    """Run in the foreground until SIGTERM or SIGINT; returns the exit code.

    Raises Unavailable when the ledger does not answer at the start, InvalidState when its schema
    is of another version.
    """
    configure_logging(settings, role="coordinator")
    ledger = Ledger(settings.ledger)
    ledger.check_revision()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    presence = Presence(
        ledger,
        role="coordinator",
        settings=settings,
        pages={"/sd": targets_page(ledger)},
        collectors=(FleetCollector(ledger, settings),),
        # Prometheus must find the discovery page where its configuration says.
        fixed_port=settings.metrics_port != 0,
    )
    with presence:
        _LOG.info("coordinator up", metrics_port=presence.metrics_port)
        Sweeper(ledger, CeleryBell(settings), settings).run(stop)
    ledger.close()
    return 0
