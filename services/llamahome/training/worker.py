"""The queue worker for ``llamahome.training``: the thin edge."""

from __future__ import annotations

from llamahome.config import Settings
from llamahome.errors import InvalidConfig
from llamahome.queueing.worker import serve
from llamahome.schemas import Stage
from llamahome.training.stage import key, make_stage, shutdown_engine


def main(settings: Settings, concurrency: int = 1) -> int:
    """Serve until told to end; the exit status. Raises InvalidConfig for more than one at a time.

    One supervisor holds one engine, and one engine one device, on which it trains up to
    ``settings.slots`` jobs side by side: a second worker is a second device.
    """
    if concurrency != 1:
        raise InvalidConfig(
            f"a training worker has one engine, not {concurrency}", field="concurrency",
            remedy="Start one worker for each device",
        )  # fmt: skip
    return serve(
        Stage.training, make_stage(settings), key, settings,
        concurrency=concurrency, slots=settings.slots, on_exit=shutdown_engine,
    )  # fmt: skip
