"""The queue worker for ``llamahome.validation``: the thin edge."""

from __future__ import annotations

from llamahome.config import Settings
from llamahome.queueing.worker import serve
from llamahome.schemas import Stage
from llamahome.validation.stage import key, run


def main(settings: Settings, concurrency: int = 1) -> int:
    """Serve until told to end; the exit status."""
    return serve(Stage.validation, run, key, settings, concurrency=concurrency)
