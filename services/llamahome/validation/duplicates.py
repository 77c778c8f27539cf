"""Equal rows, within and across files, by the digests the shards left: 40 bytes of memory a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
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
class Rows:
    """One side's rows: ``digests`` S32 [n], ``files`` int64 [n] (index in ``names``), ``lines``
    int64 [n].
    """

    names: Sequence[str]
    digests: NDArray[np.bytes_]
    files: NDArray[np.int64]
    lines: NDArray[np.int64]

    @classmethod
    def of(cls, names: Sequence[str], parts: Iterable[tuple[int, bytes, bytes, int]]) -> Rows:
        """From parts of files: (file, digests, lines as int64 little-endian, lines before it)."""
        digests: list[NDArray[Any]] = [np.zeros(0, _DIGEST)]
        files: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        lines: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for file, raw_digests, raw_lines, before in parts:
            digests.append(np.frombuffer(raw_digests, _DIGEST))
            found = np.frombuffer(raw_lines, np.dtype("<i8"))
            lines.append(found + before)
            files.append(np.full(len(found), file, np.int64))
        return cls(names, np.concatenate(digests), np.concatenate(files), np.concatenate(lines))


def find_duplicates(shards: Sequence[CheckedShard], spec: JobSpec) -> Duplicates:
    """Duplicates among the rows that the shards left, and leakage from training to validation."""
    training, validation = (
        Rows.of([file.filename for file in files], _parts(shards, split))
        for split, files in (
            ("training", spec.training_files),
            ("validation", spec.validation_files),
        )
    )
    return compare(training, validation)


def compare(training: Rows, validation: Rows) -> Duplicates:
    """Duplicates on each side, and leakage from training into validation."""
    rows = 0
    groups: list[tuple[JsonObject, ...]] = []
    for side in (training, validation):
        runs = _Runs.of(side.digests)
        rows += len(side.digests) - len(runs.starts)
        groups += _examples(side, runs)
    leaked = 0
    if len(validation.digests):
        leaked = int(np.isin(validation.digests, training.digests).sum())
    return Duplicates(rows, leaked, tuple(groups[:EXAMPLES]))


def _parts(shards: Sequence[CheckedShard], split: str) -> Iterator[tuple[int, bytes, bytes, int]]:
    for shard in shards:
        if shard.split == split:
            digests = (shard.folder / HASHES_NAME).read_bytes()
            lines = (shard.folder / LINES_NAME).read_bytes()
            yield shard.index, digests, lines, shard.first_line


@dataclasses.dataclass(frozen=True, slots=True)
class _Runs:
    """Rows by their digests: ``order`` int64 [n], equal ones beside each other in source order, and
    where the runs of equal ones start in it.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, digests: NDArray[np.bytes_]) -> _Runs:
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        return cls(order, np.concatenate([np.zeros(min(1, len(order)), np.int64), changes]))


def _examples(side: Rows, runs: _Runs) -> list[tuple[JsonObject, ...]]:
    """The first groups of equal rows, ordered by the place of their first row."""
    ends = np.append(runs.starts[1:], len(runs.order))
    repeated = np.flatnonzero(ends - runs.starts > 1)
    firsts = runs.order[runs.starts[repeated]]
    return [
        tuple(
            {"file": side.names[side.files[row]], "line": int(side.lines[row])}
            for row in runs.order[runs.starts[run] : min(ends[run], runs.starts[run] + EXAMPLES)]
        )
        for run in repeated[np.argsort(firsts)][:EXAMPLES]
    ]
