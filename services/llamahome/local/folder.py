"""The folder of a run without a fleet: its lock, its record, its checkpoints and its result.

::

    OUT/adapter/            the result; it appears whole, by a rename
    OUT/checkpoints/        everything else: run.json (what the run is), checkpoints, work in hand
    OUT/quarantine.jsonl    the rows that could not be used, where there are any
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from llamahome.errors import InvalidState
from llamahome.local.record import RunRecord

LOCK_NAME = ".lock"
WEIGHTS_NAME = "adapter_model.safetensors"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class OutFolder:
    """A held folder; see :func:`held`."""

    def __init__(self, root: Path, *, lockable: bool) -> None:
        self.root = root
        self.lockable = lockable
        self.adapter = root / "adapter"
        self.work = root / "checkpoints"
        self.scratch = self.work / "scratch"
        self.earlier = root / "checkpoints.earlier"
        self._outputs = self.work / "outputs.json"
        self._record = self.work / "run.json"

    @property
    def finished(self) -> bool:
        return (self.adapter / WEIGHTS_NAME).is_file()

    @property
    def has_checkpoints(self) -> bool:
        return any(self.work.glob("jobs/*/runs/*/f*/checkpoint-*"))

    def record(self) -> RunRecord | None:
        """What run this folder is of. None where it is of none, or its record is unreadable."""
        return RunRecord.read(self._record)

    def begin(self, record: RunRecord, *, resume: bool) -> bool:
        """Make ready for a run. True where checkpoints of an earlier one were set aside."""
        aside = False
        if self.work.is_dir() and any(self.work.iterdir()) and not self._is_ours():
            raise InvalidState(
                "holds files that no run of ours left", file=str(self.work),
                code="folder_not_empty", remedy="Move them, or name another folder with --out",
            )  # fmt: skip
        if not resume and self.has_checkpoints:
            self._forget_earlier()
            self.work.rename(self.earlier)
            aside = True
        self._sweep()
        self.scratch.mkdir(parents=True)
        record.write(self._record)
        return aside

    def _is_ours(self) -> bool:
        return self._record.exists() or self.scratch.is_dir() or self.has_checkpoints

    def finish(self, published: Path) -> None:
        """Put the published adapter into its place, and clean up."""
        for path in (published, *published.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            published.rename(self.adapter)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy_beside(published, self.adapter).rename(self.adapter)
        _sync(self.root)
        self._sweep()
        for name in ("artifacts", "outputs.json"):
            _remove(self.work / name)
        self._forget_earlier()

    def _forget_earlier(self) -> None:
        if self.earlier.is_symlink():  # it was a link to where checkpoints lie
            _empty(self.earlier)
        _remove(self.earlier)

    def _sweep(self) -> None:
        """Remove what a run had in hand when it ended or was killed."""
        _remove(self.scratch)
        for name in ("adapter", ".tmp-*"):
            for left in self.work.glob(f"jobs/*/runs/*/f*/{name}"):
                _remove(left)

    def keep_quarantine(self, source: Path) -> None:
        if source.is_file() and source.stat().st_size:
            shutil.copyfile(source, self.root / "quarantine.jsonl")

    def abandon(self) -> None:
        """Leave nothing half-done behind a run that failed before it saved anything."""
        if not self._is_ours():
            return
        if self.has_checkpoints:
            _remove(self.scratch)
        else:
            _empty(self.work)
            if not self.work.is_symlink():
                self.work.rmdir()
            if self.earlier.is_dir():
                self.earlier.rename(self.work)

    def write_outputs(self, body: object) -> None:
        """Remember what the data stages gave, for a resumed run."""
        partial = self._outputs.with_name("outputs.partial")
        partial.write_text(json.dumps(body), encoding="utf-8")
        partial.replace(self._outputs)

    def read_outputs(self) -> object:
        """What :meth:`write_outputs` was given; None where nothing readable is there."""
        try:
            content: object = json.loads(self._outputs.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content


@contextlib.contextmanager
def held(root: Path) -> Iterator[OutFolder]:
    """Hold the folder, which is made when missing, against other runs.

    The kernel drops the lock with the process (over NFS, the server does), so a dead run never
    blocks. A folder that is empty in the end is removed again where it was made here.
    Raises InvalidState naming who holds it, or where something else is in its place.
    """
    if root.exists() and not root.is_dir():
        raise InvalidState("is no folder", file=str(root), code="not_a_folder",
                           remedy="Name another with --out")  # fmt: skip
    made = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    handle, lockable = _lock(root)
    try:
        if lockable:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield OutFolder(root, lockable=lockable)
    finally:
        if {path.name for path in root.iterdir()} == {LOCK_NAME}:
            (root / LOCK_NAME).unlink()
            if made:
                root.rmdir()
        os.close(handle)


def _lock(root: Path) -> tuple[int, bool]:
    """The held lock file, and whether this file system can hold one."""
    path = root / LOCK_NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle, False
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise InvalidState(
                f"another run works in it ({holder})", file=str(root), code="folder_in_use",
                remedy="Wait for it to end, or name another folder with --out",
            ) from None  # fmt: skip
        if _is_still(handle, path):
            return handle, True
        os.close(handle)  # the one before removed it as it ended


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def copy_beside(folder: Path, place: Path) -> Path:
    """A durable copy of ``folder`` on the file system of ``place``, to be renamed to it.

    What a copy that was killed left there is removed. Raises OSError, and leaves nothing then.
    """
    copy = place.with_name(f".{place.name}.copy")
    _remove(copy)
    try:
        copy.mkdir()
        for path in sorted(folder.rglob("*")):
            target = copy / path.relative_to(folder)
            if path.is_dir():
                target.mkdir()
            else:
                shutil.copy(path, target)
                _sync(target)
        for below, _, _ in os.walk(copy):
            _sync(Path(below))
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _empty(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            _remove(path)


def _remove(path: Path) -> None:
    """Nothing there is fine; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """A file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
