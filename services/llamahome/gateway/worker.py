"""The gateway's process: binds, serves, says where, and ends gracefully."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import structlog
import uvicorn

from llamahome.config import Settings
from llamahome.config.logs import configure_logging
from llamahome.errors import InvalidConfig
from llamahome.gateway.app import create_app
from llamahome.gateway.deps import GatewayDeps
from llamahome.ledger import Ledger
from llamahome.queueing.admission import Admission
from llamahome.queueing.doorbell import CeleryBell
from llamahome.queueing.presence import Presence
from llamahome.storage import open_storage

URL_FILE = "gateway.url"
# Longer than clients keep idle connections (httpx2: 5 s), so that it is they who close them: a
# server that closes first makes the request that is just being sent fail.
KEEP_ALIVE_SECONDS = 75

OnReady = Callable[[str], None]
_LOG = structlog.get_logger(__name__)


def main(settings: Settings, *, on_ready: OnReady | None = None) -> int:
    """Run in the foreground until SIGTERM or SIGINT; returns the exit code.

    Once it accepts connections, ``on_ready`` is called with the URL; with a state folder the URL
    is also written to ``<state>/gateway.url`` while it serves. Raises InvalidConfig when the
    address cannot be listened on, Unavailable when the ledger does not answer at the start,
    InvalidState when its schema is of another version.
    """
    configure_logging(settings, role="gateway")
    ledger = Ledger(settings.ledger)
    with contextlib.closing(ledger), _listening(settings) as listener:
        ledger.check_revision()
        storage = open_storage(settings.storage)
        admission = Admission(ledger, storage, settings, CeleryBell(settings))
        app = create_app(GatewayDeps(ledger, storage, admission, settings))
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        )
        url = _url(listener)
        with Presence(ledger, role="gateway", settings=settings), _announced(settings, url) as tell:

            def ready() -> None:
                _LOG.info("gateway up", url=url)
                tell()
                if on_ready is not None:
                    on_ready(url)

            Server(config, ready).run(sockets=[listener])
    return 0


class Server(uvicorn.Server):
    """uvicorn that says when it accepts connections, and for which a signal is a normal end."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again after a graceful end, which would make the exit code -15.
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second time, open downloads are not waited for
        self.should_exit = True


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """A socket bound here, so that the port is known before anything is said."""
    host, port = settings.gateway_host, settings.gateway_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise InvalidConfig(
                f"{host}:{port} cannot be listened on ({error.strerror})",
                field="LLAMAHOME_GATEWAY_PORT", remedy="Name another port, or 0 for any free one",
            ) from None  # fmt: skip
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _announced(settings: Settings, url: str) -> Iterator[Callable[[], None]]:
    """Yields what writes ``<state>/gateway.url``, whole or not at all; removed at the end."""
    if settings.state is None:
        yield lambda: None
        return
    path = settings.state / URL_FILE
    try:
        yield lambda: _write_whole(path, url + "\n")
    finally:
        path.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
