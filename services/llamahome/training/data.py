"""What is trained on: token rows, and their order in each epoch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from llamahome.conversations.tokens import TokenRows, read_token_rows
from llamahome.errors import CorruptArtifact, InvalidData
from llamahome.schemas import PreparationReport

TRAINING_FILE = "training.safetensors"
VALIDATION_FILE = "validation.safetensors"
PREPARATION_FILE = "preparation.json"
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Both sides of the split; validation may be empty.

    ``added`` are the ids of tokens that the data have beyond the base's (``template: markers``).
    """

    training: TokenRows
    validation: TokenRows
    added: tuple[int, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> TokenData:
        """What preprocessing published in the folder. Raises CorruptArtifact."""
        return cls(
            training=read_token_rows(folder / TRAINING_FILE),
            validation=read_token_rows(folder / VALIDATION_FILE),
            added=_added_tokens(folder / PREPARATION_FILE),
        )

    def digest(self) -> str:
        """sha256 over every id, boundary and mask bit: equal data give equal digests."""
        state = hashlib.sha256()
        for rows in (self.training, self.validation):
            for array in (rows.offsets, rows.ids, np.packbits(rows.trained, bitorder="little")):
                state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def check(self) -> None:
        """Raises InvalidData where no training row has a token to learn."""
        if len(self.training) == 0:
            raise InvalidData("no training rows", code="invalid_n_examples")
        if labelled_counts(self.training).sum() == 0:
            raise InvalidData(
                f"none of {len(self.training)} training rows has a token that is trained",
                remedy="Check loss_scope and the messages' weights",
            )


def _added_tokens(path: Path) -> tuple[int, ...]:
    try:
        report = PreparationReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()  # rows that were not prepared by us
    except (OSError, ValidationError) as error:
        raise CorruptArtifact(f"cannot be read: {error}", file=path.name) from error
    return tuple(sorted(report.markers.added_tokens.values())) if report.markers else ()


def labelled_counts(rows: TokenRows) -> NDArray[np.int64]:
    """Tokens of each row that carry loss, int64 [rows]: the trained ones but a row's first."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.trained, dtype=np.int64)])
    starts, ends = rows.offsets[:-1], rows.offsets[1:]
    counts: NDArray[np.int64] = before[ends] - before[np.minimum(starts + 1, ends)]
    return counts


def longest_row(data: TokenData) -> int:
    """Tokens of the longest row of either side."""
    return max((int(rows.lengths.max()) for rows in _filled(data)), default=0)


def largest_id(data: TokenData) -> int:
    return max((int(rows.ids.max()) for rows in _filled(data) if len(rows.ids)), default=0)


def _filled(data: TokenData) -> list[TokenRows]:
    return [rows for rows in (data.training, data.validation) if len(rows)]


@functools.lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of rows in an epoch (from 0), a pure function of its arguments.

    Rows are sorted by SplitMix64 (Steele, Lea, Flood 2014) of (seed, epoch, row): plain integer
    arithmetic, so no library's change of generator can change an order that a checkpoint counts on.
    """
    stream = _splitmix64(np.array([seed], np.uint64)) ^ np.uint64(epoch)
    keys = _splitmix64(_splitmix64(stream) + np.arange(rows, dtype=np.uint64) * np.uint64(_GOLDEN))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False  # shared through the cache
    return order


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
