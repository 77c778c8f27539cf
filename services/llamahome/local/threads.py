"""Work in a thread of its own, while the event loop goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from llamahome.errors import Stopped
from llamahome.schemas import StopReason

T = TypeVar("T")


class Stopper:
    """Asks the work in a thread to end at its next boundary, with a checkpoint where it has one."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    def reason(self) -> StopReason | None:
        """For a stage's ``should_stop``."""
        return StopReason.drain if self._asked.is_set() else None


async def in_thread(work: Callable[[Stopper], T]) -> T:
    """What ``work`` returns. A cancelled caller leaves only when the work has ended, cleanly.

    Raises what the work raises; what it raises after a cancel, but for Stopped, is noted on the
    CancelledError.
    """
    stopper = Stopper()
    running = asyncio.ensure_future(asyncio.to_thread(work, stopper))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError as cancelled:
        stopper.ask()
        error = await _ended(running)
        if error is not None and not isinstance(error, Stopped):
            cancelled.add_note(f"as it ended: {type(error).__name__}: {error}")
        raise


async def _ended(running: asyncio.Future[T]) -> BaseException | None:
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError:
            continue  # once more: it is ending already
    return None if running.cancelled() else running.exception()
