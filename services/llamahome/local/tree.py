"""SPEC's folders below ``data_dir``, and how one of them is replaced whole.

::

    data/training/samples/            *.jsonl, what a user puts there
    data/training/processed/NAME/     a prepared set
    data/training/checkpoints/NAME/   a run's checkpoints
    data/models/MODEL/VERSION/        a base that no registry names
    data/models/finetuned/NAME_finetuned/
    data/metrics/NAME.json, NAME.history.jsonl

NAME is ``<model>_<version>``. In a folder that is not called ``data`` and holds no ``training``,
the folders below ``training`` lie directly in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llamahome.errors import InvalidState
from llamahome.local.folder import NO_LOCKS, copy_beside, held
from llamahome.storage.exchange import exchange

_WORK_PREFIX = ".work-"
_OLD_SUFFIX = ".replaced"


@dataclasses.dataclass(frozen=True)
class Tree:
    """The folders of one ``data_dir``; see the module."""

    root: Path
    nested: bool

    @classmethod
    def of(cls, root: Path) -> Tree:
        return cls(root, root.absolute().name == "data" or (root / "training").is_dir())

    @property
    def _training(self) -> Path:
        return self.root / "training" if self.nested else self.root

    @property
    def samples(self) -> Path:
        return self._training / "samples"

    @property
    def processed(self) -> Path:
        return self._training / "processed"

    @property
    def checkpoints(self) -> Path:
        return self._training / "checkpoints"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def finetuned(self) -> Path:
        return self.models / "finetuned"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else is in such a block for ``folder``, which is made when missing. For moments only:
    it waits. A file system without locks is used without one."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, gone afterwards; what killed processes left there is removed."""
    holding = contextlib.ExitStack()
    with locked(parent):
        for left in parent.glob(f"{_WORK_PREFIX}*"):
            _remove_dead(left)
        folder = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=parent))
        try:
            holding.enter_context(held(folder))
        except BaseException:
            shutil.rmtree(folder)
            raise
    try:
        yield folder
    finally:
        # Under the lock too: another one that begins would find it let go, and remove it as well.
        with locked(parent):
            holding.close()
            shutil.rmtree(folder)


def _remove_dead(folder: Path) -> None:
    try:
        with held(folder):
            shutil.rmtree(folder)
            folder.mkdir()  # the lock's file is looked for as it is let go
    except InvalidState:
        return  # somebody works in it
    folder.rmdir()


def replace_folder(new: Path, place: Path) -> None:
    """Put ``new`` in the place of ``place``, which is removed where it is there.

    At no moment is a mixture there. On Linux the two change places at once; elsewhere ``place`` is
    missing for a moment, and :func:`recover` puts the old one back after a crash in it. From
    another file system a copy takes the place, and ``new`` is there until it has. A link stays, and
    what it leads to is replaced. Callers hold ``locked(place.parent)``. Raises OSError.
    """
    place = place.resolve()
    try:
        _replace(new, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        recover(place)
        _replace(copy_beside(new, place), place)
        shutil.rmtree(new)


def _replace(new: Path, place: Path) -> None:
    _sync(new)
    if not place.exists():
        new.rename(place)
    elif exchange(new, place):
        shutil.rmtree(new)
    else:
        old = place.with_name(f".{place.name}{_OLD_SUFFIX}")
        place.rename(old)
        new.rename(place)
        shutil.rmtree(old)
    _sync(place.parent)


def recover(place: Path) -> None:
    """Undo what a crash in :func:`replace_folder` left. Callers hold ``locked(place.parent)``."""
    place = place.resolve()
    old = place.with_name(f".{place.name}{_OLD_SUFFIX}")
    if old.is_dir():
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
