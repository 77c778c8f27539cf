"""What one forward and backward pass works on: micro-batches of several jobs, end to end, unpadded.

T below is the tokens of a pass, N its labelled ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llamahome.conversations.tokens import TokenRows
from llamahome.training.engine.draws import DropKey
from llamahome.training.engine.slots import Slot


@dataclasses.dataclass(frozen=True)
class Unit:
    """The least that is scheduled: rows of one job that go through the model together.

    ``rows`` are those of a micro-batch with a label in them, each without what follows its last
    labelled place, which no loss depends on. ``places`` [N] are where a labelled token is
    predicted, counted over the rows laid end to end, ``targets`` [N] those tokens. ``weight``
    multiplies each label's loss. ``drops`` is None where nothing is learned. Only a part of a
    micro-batch has other than 0 in ``first``, the place of its first token there, and in ``whole``,
    the tokens of all its parts.
    """

    slot: Slot
    rows: tuple[NDArray[np.int32], ...]
    places: NDArray[np.int64]
    targets: NDArray[np.int64]
    weight: float
    learns: bool
    drops: DropKey | None = None
    first: int = 0
    whole: int = 0

    @property
    def micro_batch_tokens(self) -> int:
        """Those of the micro-batch that it is, or is a part of."""
        return self.whole or self.tokens

    @functools.cached_property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @functools.cached_property
    def longest(self) -> int:
        return max((len(row) for row in self.rows), default=0)


def make_unit(
    slot: Slot,
    rows: TokenRows,
    samples: Sequence[int] | NDArray[np.int64],
    *,
    weight: float,
    learns: bool,
    drops: DropKey | None = None,
    most_tokens: int | None = None,
) -> Unit:
    """The rows ``samples``. A place has a label where the token after it is trained.

    With ``most_tokens`` each row is cut after so many, but not before its first label.
    """
    kept: list[NDArray[np.int32]] = []
    places: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    tokens = 0
    for sample in samples:
        ids, trained = rows.row(int(sample))
        found = np.flatnonzero(trained[1:])
        if not len(found):
            continue
        if most_tokens is not None:
            found = found[found < max(most_tokens, int(found[0]) + 1)]
        length = int(found[-1]) + 1
        kept.append(ids[:length])
        places.append(found + tokens)
        targets.append(ids[found + 1].astype(np.int64))
        tokens += length
    none = np.zeros(0, np.int64)
    return Unit(
        slot, tuple(kept), np.concatenate([none, *places]), np.concatenate([none, *targets]),
        weight, learns, drops,
    )  # fmt: skip


def split_unit(unit: Unit, tokens: int) -> list[Unit]:
    """Parts of at most ``tokens`` tokens each, cut between rows; a longer row stays whole.

    Together they give the unit's loss and gradient, but for the order in which sums are taken.
    """
    parts: list[Unit] = []
    begin, place = 0, 0
    while begin < len(unit.rows):
        end, size = begin + 1, len(unit.rows[begin])
        while end < len(unit.rows) and size + len(unit.rows[end]) <= tokens:
            size += len(unit.rows[end])
            end += 1
        mine = (unit.places >= place) & (unit.places < place + size)
        parts.append(
            dataclasses.replace(
                unit,
                rows=unit.rows[begin:end],
                places=unit.places[mine] - place,
                targets=unit.targets[mine],
                first=unit.first + place,
                whole=unit.micro_batch_tokens,
            )  # fmt: skip
        )
        begin, place = end, place + size
    return parts


@dataclasses.dataclass(frozen=True)
class Segment:
    """The tokens [start, end) of a pass, and the labels [first_label, last_label): one unit's."""

    unit: Unit
    start: int
    end: int
    first_label: int
    last_label: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """Units laid end to end. ``ids`` and ``positions`` int64 [T, a multiple of the block], with
    zeros after the last unit; ``lengths`` of the sequences without those; ``places`` and
    ``targets`` int64 [N], ``weights`` fp32 [N]."""

    segments: tuple[Segment, ...]
    lengths: tuple[int, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    learns: bool

    @property
    def tokens(self) -> int:
        return self.segments[-1].end


def make_pass(units: Sequence[Unit], block: int, device: torch.device) -> Pass:
    """``block``: see :func:`row_block`. All units learn, or none does."""
    segments: list[Segment] = []
    start = label = 0
    for unit in units:
        segment = Segment(unit, start, start + unit.tokens, label, label + len(unit.targets))
        segments.append(segment)
        start, label = segment.end, segment.last_label
    rows = [row for unit in units for row in unit.rows]
    room = -start % block
    pad = np.zeros(room, np.int64)
    weights = [np.full(len(unit.targets), unit.weight) for unit in units]
    arrays = (
        np.concatenate([*rows, pad]).astype(np.int64),
        np.concatenate([*(np.arange(len(row)) for row in rows), pad]),
        np.concatenate([s.unit.places + s.start for s in segments]),
        np.concatenate([unit.targets for unit in units]),
        np.concatenate(weights),
    )
    ids, positions, places, targets, weight = (torch.from_numpy(each) for each in arrays)
    return Pass(
        tuple(segments), tuple(len(row) for row in rows), ids.to(device), positions.to(device),
        places.to(device), targets.to(device), weight.to(device), units[0].learns,
    )  # fmt: skip


def row_block(device: torch.device, threads: int) -> int:
    """Rows of every matrix product are filled up to a multiple of this.

    On a CPU a row's result depends on how a product is cut into blocks; with 16 rows for each
    thread and multiples of it, nothing differed in bits between any two numbers of rows. On CUDA a
    multiple of 16 keeps to the fast kernels; equality in bits is not promised there.
    """
    return 16 if device.type == "cuda" else 16 * threads
