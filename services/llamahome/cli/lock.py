"""One `llamahome up` at a time on a state folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llamahome.errors import InvalidState

LOCK_NAME = "up.lock"
_TRIES = 5
_BETWEEN_TRIES_SECONDS = 0.02


class Holder(NamedTuple):
    """Who holds a state folder. ``url`` is None until it knows where its gateway listens."""

    pid: int | None
    url: str | None

    def __str__(self) -> str:
        return f"pid {self.pid or 'unknown'}, {self.url or 'still starting'}"


class StateLock:
    """The held lock. The kernel drops it with the process, so a dead `up` never blocks."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def announce(self, url: str | None) -> None:
        """Write who holds it, for those who are refused."""
        content = json.dumps({"pid": os.getpid(), "url": url}).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)


@contextlib.contextmanager
def locked(state: Path) -> Iterator[StateLock]:
    """Hold the state folder. Raises InvalidState naming the pid and URL of who holds it."""
    handle = os.open(state / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _taken(handle):
            raise InvalidState(
                f"a fleet already runs here ({_read(handle)})", file=str(state), code="fleet_runs",
                remedy="Use it, end it with Ctrl-C, or name another folder with --state",
            )  # fmt: skip
        lock = StateLock(handle)
        lock.announce(None)
        yield lock
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    """Take the lock. Tried a few times: :func:`holder` holds it too, for an instant."""
    for tries_left in reversed(range(_TRIES)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if tries_left:
                time.sleep(_BETWEEN_TRIES_SECONDS)
    return False


def holder(state: Path) -> Holder | None:
    """Who runs a fleet on this folder; None when nobody does."""
    try:
        handle = os.open(state / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(handle)
    finally:
        os.close(handle)
    return None


def _read(handle: int) -> Holder:
    try:
        content = json.loads(os.pread(handle, 4096, 0))
        return Holder(int(content["pid"]), content["url"])
    except (ValueError, KeyError, TypeError):  # taken a moment ago, not written yet
        return Holder(None, None)
