"""A process shows itself: its row in the ledger, kept fresh, and its metrics page."""

from __future__ import annotations

import os
import platform
import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from types import TracebackType
from typing import Self

import structlog
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from llamahome.config import Settings
from llamahome.errors import Unavailable
from llamahome.ledger import Ledger
from llamahome.metrics import MetricsServer, family, process_registry
from llamahome.metrics.catalogue import WORKER_INFO
from llamahome.metrics.serve import Page
from llamahome.schemas import JsonObject

_LOG = structlog.get_logger(__name__)


class Presence:
    """Heartbeats every ``heartbeat_seconds`` while entered; says ``stopped`` on leaving.

    ``slots`` is how many runs this process can hold at once (0 for one that holds none). While
    ``check`` raises Unavailable it shows itself as ``broken``, with no slots and the reason. With
    ``fixed_port`` a taken metrics port raises Unavailable; otherwise any free one is used then.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        role: str,
        settings: Settings,
        slots: int = 0,
        info: JsonObject | None = None,
        pages: dict[str, Page] | None = None,
        collectors: tuple[Collector, ...] = (),
        fixed_port: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.id = f"{role}-{settings.host}-{os.getpid()}-{secrets.token_hex(2)}"
        self._ledger = ledger
        self._role = role
        self._settings = settings
        self._slots = slots
        self._info = info or {}
        self._state = "up"
        self._check = check
        self._broken: str | None = None
        self._version = version("llamahome")
        self._changed = threading.Event()
        self._ended = False
        registry = process_registry()
        for collector in (ProcessInfo(self.id, role, self._version), *collectors):
            registry.register(collector)
        self._server = self._serve(registry, pages, fixed_port)
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def _serve(
        self, registry: CollectorRegistry, pages: dict[str, Page] | None, fixed_port: bool
    ) -> MetricsServer:
        host, port = self._settings.metrics_host, self._settings.metrics_port
        try:
            return MetricsServer(registry, host=host, port=port, pages=pages)
        except Unavailable:
            if fixed_port:
                raise
            # Several pool children of one container share a setting; the port that each got
            # stands in its row, and the coordinator's service discovery hands it on.
            return MetricsServer(registry, host=host, port=0, pages=pages)

    @property
    def metrics_port(self) -> int:
        return self._server.port

    def __enter__(self) -> Self:
        self._stack.enter_context(self._server)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        self._changed.set()
        self._thread.join()
        self._stack.close()
        self._state, self._check, self._broken = "stopped", None, None
        self._beat()

    def state(self, state: str) -> None:
        """Say up, busy or draining; written at once. ``broken`` is found by ``check`` alone."""
        if state != self._state:
            self._state = state
            self._changed.set()

    def inform(self, **info: object) -> None:
        """Add facts to the row (an engine's pid, a warm base)."""
        self._info = self._info | info
        self._changed.set()

    def _run(self) -> None:
        while not self._ended:
            self._changed.wait(self._settings.heartbeat_seconds)
            self._changed.clear()
            if not self._ended:
                self._beat()

    def _look(self) -> None:
        """Whether this process can work at all, now."""
        if self._check is None:
            return
        try:
            self._check()
        except Unavailable as error:
            if self._broken is None:
                _LOG.error("this process cannot work", error=str(error))
            self._broken = str(error)
            return
        if self._broken is not None:
            _LOG.info("this process can work again")
        self._broken = None

    def _beat(self) -> None:
        self._look()
        broken = self._broken is not None
        try:
            self._ledger.heartbeat(
                self.id,
                role=self._role,
                host=self._settings.host,
                pid=os.getpid(),
                state="broken" if broken else self._state,
                version=self._version,
                slots=0 if broken else self._slots,
                metrics_port=self.metrics_port,
                info=self._info | ({"broken": self._broken} if broken else {}),
            )
        except Unavailable as error:
            # A missed heartbeat shows as a lost process; the next one mends it.
            _LOG.warning("heartbeat not written", error=str(error))


class ProcessInfo(Collector):
    """``llamahome_worker_info``: what this process is."""

    def __init__(self, worker: str, role: str, release: str) -> None:
        self._labels = (worker, role, release, platform.python_version())

    def collect(self) -> list[Metric]:
        return [family(WORKER_INFO, [(self._labels, 1.0)])]
