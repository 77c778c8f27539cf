"""Attempts' local folders: made, guarded while their worker lives, removed when it is gone.

Each folder is locked (flock(2)) by the process that works in it. The kernel drops the lock when
that process ends, however it does, so a folder that can be locked is nobody's any more. Several
workers may share a root. Where a file system has no locks on folders (NFS), nothing of others is
ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog

from llamahome.errors import Unavailable

UNUSABLE = "scratch_unusable"
_PREFIX = "attempt-"
# Written to see whether there is room: with less than this no attempt gets anywhere.
_PROBE_BYTES = 1024 * 1024
_LOG = structlog.get_logger(__name__)


class Scratch:
    """The folders of attempts below one root, which is made when missing."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder that is this process's own until the block ends. Raises OSError."""
        path, lock = self._own()
        try:
            yield path
        finally:
            try:
                _remove(path)
            finally:
                os.close(lock)

    def check(self) -> None:
        """Raises Unavailable (code ``scratch_unusable``) where an attempt could write nothing."""
        try:
            self._make_root()
            with tempfile.TemporaryFile(dir=self._root) as file:
                file.write(bytes(_PROBE_BYTES))
        except OSError as error:
            raise Unavailable(
                f"the scratch folder cannot be written to ({error.strerror or error})",
                code=UNUSABLE, file=str(self._root),
                remedy="Free space there, or see that it is mounted and writable; "
                "until then this worker takes no work",
            ) from error  # fmt: skip

    def sweep(self) -> None:
        """Remove what attempts left behind whose process is gone; never raises OSError."""
        try:
            found = [path for path in self._root.iterdir() if path.name.startswith(_PREFIX)]
        except OSError:
            return  # there is no such folder; if it cannot be made or read, check() says so
        for path in found:
            try:
                lock = _locked(path)
            except OSError:
                continue  # somebody works there, or has just removed it, or it cannot be told
            try:
                if _is(path, lock):
                    _LOG.info("removing what a lost attempt left", folder=str(path))
                    _remove(path)
            finally:
                os.close(lock)

    def _own(self) -> tuple[Path, int]:
        self._make_root()
        while True:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._root))
            try:
                lock = _locked(path)
            except (FileNotFoundError, BlockingIOError):
                continue  # new and not locked yet, it was taken for a leftover
            except OSError:
                # No locks on folders here: nobody else can have one either, so it stays ours.
                return path, os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            if _is(path, lock):
                return path, lock
            os.close(lock)

    def _make_root(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)


def _locked(path: Path) -> int:
    """A descriptor that holds the folder's lock. Raises OSError where it cannot be had."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    """Whether the folder is still there: it may have been removed before it was locked."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        # The attempt's end stands, whatever becomes of its files; the next sweep tries again.
        _LOG.warning("scratch folder not removed", folder=str(path), error=str(error))
