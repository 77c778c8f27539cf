"""Equal rows, within and across files, by the digests the shards left: 40 bytes of memory a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamahome.schemas import JobSpec, JsonObject
from llamahome.validation.shard import HASHES_NAME, LINES_NAME

EXAMPLES = 50
# Fixed-width bytes sort and compare whole; only a view's trailing NULs are cut, on all alike.
_DIGEST = np.dtype("S32")


class CheckedShard(Protocol):
    @property
    def split(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def first_line(self) -> int: ...
    @property
    def folder(self) -> Path: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Duplicates:
    """``rows`` have an equal one before them on their side; ``leaked`` validation rows have one in
    the training files. ``groups`` are the first groups of equal rows, each with its places.
    """

    rows: int
    leaked: int
    groups: tuple[tuple[JsonObject, ...], ...]

    def to_json(self) -> JsonObject:
        return {
            "duplicates": self.rows,
            "leaked": self.leaked,
            "examples": [list(group) for group in self.groups],
        }


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """digests S32 [n], file int64 [n] (index within its side), line int64 [n]."""

    digests: NDArray[np.bytes_]
    files: NDArray[np.int64]
    lines: NDArray[np.int64]


def find_duplicates(shards: Sequence[CheckedShard], spec: JobSpec) -> Duplicates:
    """Duplicates on each side, and leakage from training into validation."""
    training = _read([shard for shard in shards if shard.split == "training"])
    validation = _read([shard for shard in shards if shard.split == "validation"])
    rows = 0
    groups: list[tuple[JsonObject, ...]] = []
    for side, files in ((training, spec.training_files), (validation, spec.validation_files)):
        names = [file.filename for file in files]
        rows += len(side.digests) - len(np.unique(side.digests))
        groups += _examples(side, names)
    leaked = int(np.isin(validation.digests, training.digests).sum())
    return Duplicates(rows, leaked, tuple(groups[:EXAMPLES]))


def _read(shards: Sequence[CheckedShard]) -> _Rows:
    digests: list[NDArray[Any]] = [np.zeros(0, _DIGEST)]
    files: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    lines: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for shard in shards:
        digests.append(np.frombuffer((shard.folder / HASHES_NAME).read_bytes(), _DIGEST))
        found = np.frombuffer((shard.folder / LINES_NAME).read_bytes(), np.dtype("<i8"))
        lines.append(found + shard.first_line)
        files.append(np.full(len(found), shard.index, np.int64))
    return _Rows(np.concatenate(digests), np.concatenate(files), np.concatenate(lines))


def _examples(side: _Rows, names: Sequence[str]) -> list[tuple[JsonObject, ...]]:
    """The first groups of equal rows, ordered by the place of their first row."""
    order = np.argsort(side.digests, kind="stable")
    ordered = side.digests[order]
    borders = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], borders]).astype(np.int64)
    ends = np.concatenate([borders, [len(ordered)]]).astype(np.int64)
    repeated = [(order[a], a, b) for a, b in zip(starts, ends, strict=True) if b - a > 1]
    return [
        tuple(
            {"file": names[side.files[row]], "line": int(side.lines[row])}
            for row in order[a : min(b, a + EXAMPLES)]
        )
        for _, a, b in sorted(repeated)[:EXAMPLES]
    ]
