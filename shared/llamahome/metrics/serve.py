"""Serving a process's own metrics page, and any other small page beside it, from one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app

from llamahome.errors import Unavailable
from llamahome.metrics.catalogue import Series

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
Page = Callable[[], tuple[str, bytes]]  # -> content type, body


def family(series: Series, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """A metric family with its samples: (label values in the catalogue's order, value)."""
    kind = CounterMetricFamily if series.type == "counter" else GaugeMetricFamily
    out = kind(series.name, series.help, labels=series.labels)
    for labels, value in samples:
        out.add_metric(labels, value)
    return out


def process_registry() -> CollectorRegistry:
    """A registry with this process's memory, CPU and interpreter facts; no global state."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class MetricsServer:
    """``/metrics`` (and ``pages``) on a port of its own; use as a context manager."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int,
        pages: dict[str, Page] | None = None,
    ) -> None:
        """Bind now; port 0 takes any free one. Raises Unavailable when the port is taken."""
        metrics = make_wsgi_app(registry)
        extra = pages or {}

        def app(environ: dict[str, Any], start_response: StartResponse) -> Any:
            page = extra.get(environ["PATH_INFO"])
            if page is None:
                return metrics(environ, start_response)
            content_type, body = page()
            start_response("200 OK", [("Content-Type", content_type)])
            return [body]

        try:
            self._server = make_server(
                host, port, app, server_class=_Server, handler_class=_QuietHandler
            )
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {host}:{port} ({error.strerror})", code="port_taken",
                field="LLAMAHOME_METRICS_PORT", remedy="Set it to 0 to take any free port",
            ) from None  # fmt: skip
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(WSGIServer):
    # A restarted process must be able to take its fixed port back at once.
    allow_reuse_address = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is not worth a log line."""
