"""The files of a run, read where they lie: hashed once, never copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llamahome.errors import InvalidData, NotFound
from llamahome.schemas import FileRef
from llamahome.storage import LocalStorage, hash_stream


class Input(NamedTuple):
    """A file as it was when it was hashed. ``changed_at`` is its mtime in nanoseconds."""

    ref: FileRef
    place: Path
    changed_at: int


def read_inputs(files: Sequence[Path], split: str) -> list[Input]:
    """Hash the files of one side of the split.

    Raises NotFound and InvalidData (a folder, say), naming the file; OSError where it cannot be
    read.
    """
    return [
        _read(path, name, f"{split}/{index}")
        for index, (path, name) in enumerate(zip(files, _names(files), strict=True))
    ]


def _names(files: Sequence[Path]) -> list[str]:
    """What the files are called in reports: never more of their path than tells them apart."""
    counts = Counter(path.name for path in files)
    return [
        path.name if counts[path.name] == 1 else f"{path.absolute().parent.name}/{path.name}"
        for path in files
    ]


def _read(path: Path, name: str, key: str) -> Input:
    if not path.exists():
        raise NotFound(
            "no such file", file=str(path), code="file_not_found", remedy="Check its name"
        )
    if not path.is_file():
        raise InvalidData(
            "is no regular file", file=str(path),
            remedy="Name files of conversations; a stream must be saved first",
        )  # fmt: skip
    with path.open("rb") as stream:
        size, sha256 = hash_stream(stream)
    ref = FileRef(id=key, filename=name, path=f"inputs/{key}", sha256=sha256, bytes=size)
    return Input(ref, path.absolute(), path.stat().st_mtime_ns)


class StorageWithInputs(LocalStorage):
    """A folder's storage in which the inputs stand as if they had been uploaded."""

    def __init__(self, root: Path, inputs: Sequence[Input]) -> None:
        super().__init__(root)
        self._inputs: Mapping[str, Input] = {each.ref.path: each for each in inputs}

    def open(self, path: str) -> BinaryIO:
        """As LocalStorage; raises InvalidData where an input is no longer what it was."""
        if path not in self._inputs:
            return super().open(path)
        self._check(self._inputs[path])
        return self._inputs[path].place.open("rb")

    def size(self, path: str) -> int:
        if path not in self._inputs:
            return super().size(path)
        self._check(self._inputs[path])
        return self._inputs[path].ref.bytes

    def _check(self, each: Input) -> None:
        found = each.place.stat() if each.place.is_file() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (each.ref.bytes, each.changed_at):
            raise InvalidData(
                "changed while it was being used", file=str(each.place), remedy="Start again"
            )
