"""The queue worker for ``llamahome.preprocessing``: the thin edge."""

from __future__ import annotations

from llamahome.config import Settings
from llamahome.preprocessing.stage import key, run
from llamahome.queueing.worker import serve
from llamahome.schemas import Stage


def main(settings: Settings, concurrency: int = 1) -> int:
    """Serve until told to end; the exit status."""
    return serve(Stage.preprocessing, run, key, settings, concurrency=concurrency)
