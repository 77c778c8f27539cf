"""The files of a run, read where they lie: hashed once, never copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llamahome.config import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    EarlierAdapter,
    read_adapter_config,
)
from llamahome.conversations.read import checked_name
from llamahome.errors import InvalidData, NotFound
from llamahome.schemas import ArtifactRef, FileRef, ManifestEntry
from llamahome.storage import LocalStorage, hash_stream
from llamahome.storage.manifest import artifact_ref, build_manifest


class Input(NamedTuple):
    """A file as it was when it was hashed. ``changed_at`` is its mtime in nanoseconds."""

    ref: FileRef
    place: Path
    changed_at: int


class AdapterInput(NamedTuple):
    """A folder with an adapter to go on from, as it was when it was hashed."""

    ref: ArtifactRef
    place: Path
    earlier: EarlierAdapter


def read_adapter(folder: Path) -> AdapterInput:
    """An adapter as PEFT saves one; of its folder, the weights and the config count.

    Raises NotFound where one of them is missing, InvalidConfig where it cannot be gone on from,
    OSError.
    """
    entries = []
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise NotFound(
                f"holds no {name}", file=str(folder), code="adapter_not_found",
                remedy="Name the folder of an adapter with safetensors weights, as PEFT saves it",
            )  # fmt: skip
        with (folder / name).open("rb") as stream:
            size, sha256 = hash_stream(stream)
        entries.append(ManifestEntry(name=name, bytes=size, sha256=sha256))
    ref = artifact_ref(build_manifest("adapter", entries, None), "inputs/adapter")
    place = folder.resolve()
    earlier = read_adapter_config((place / ADAPTER_CONFIG_NAME).read_bytes(), place.name)
    return AdapterInput(ref, place, earlier)


def read_inputs(files: Sequence[Path], split: str) -> list[Input]:
    """Hash the files of one side of the split.

    Raises NotFound and InvalidData (a folder, say, or a name that is not UTF-8), naming the file;
    OSError where it cannot be read.
    """
    return [
        _read(path, name, f"{split}/{index}")
        for index, (path, name) in enumerate(zip(files, _names(files), strict=True))
    ]


def _names(files: Sequence[Path]) -> list[str]:
    """What the files are called in reports: never more of their path than tells them apart."""
    counts = Counter(path.name for path in files)
    return [
        checked_name(
            path.name if counts[path.name] == 1 else f"{path.absolute().parent.name}/{path.name}"
        )
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
    """A folder's storage in which the inputs stand as if they had been uploaded, and an earlier
    adapter as if it had been published."""

    def __init__(
        self, root: Path, inputs: Sequence[Input], adapter: AdapterInput | None = None
    ) -> None:
        super().__init__(root)
        self._adapter = adapter
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

    def fetch(
        self, artifact: ArtifactRef, into: Path, *, only: Collection[str] | None = None
    ) -> Path:
        """As LocalStorage; raises InvalidData where the adapter is no longer what it was."""
        if self._adapter is None or artifact != self._adapter.ref:
            return super().fetch(artifact, into, only=only)
        place = self._adapter.place
        if read_adapter(place).ref != artifact:
            raise InvalidData(
                "changed while it was being used", file=str(place), remedy="Start again"
            )
        return place

    def _check(self, each: Input) -> None:
        found = each.place.stat() if each.place.is_file() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (each.ref.bytes, each.changed_at):
            raise InvalidData(
                "changed while it was being used", file=str(each.place), remedy="Start again"
            )
