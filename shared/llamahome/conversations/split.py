"""Training and validation rows, by content alone.

Groups of equal rows are sorted by sha256(seed, content); the first k are validation, so the split
is the same on any machine, in any file order, with any number of workers, and no row stands on
both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Indices into the rows given, int64, each side in split order; ``duplicates``, in source
    order, are in neither.
    """

    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    duplicates: NDArray[np.int64]


def validation_groups(groups: int, share: float) -> int:
    """How many of ``groups`` distinct rows are validation: 100 at 0.29 are 29, one row never is.

    Between one and all but one where there are two groups or more and ``share`` > 0; else none.
    """
    if groups < 2 or share <= 0:
        return 0
    # The 1e-9 undoes binary fractions: 100 * 0.29 is 28.999999999999996.
    return min(groups - 1, max(1, math.floor(groups * share + 1e-9)))


def split_rows(
    digests: Sequence[bytes], *, seed: int, share: float, keep_duplicates: bool
) -> Split:
    """Split rows by their canonical digests, all of one size, which come in source order.

    Equal rows stay together, in source order; without ``keep_duplicates`` only the first is kept.
    """
    if not digests:
        none = np.zeros(0, np.int64)
        return Split(none, none, none)
    rows = np.fromiter(digests, dtype=f"S{len(digests[0])}", count=len(digests))
    order = np.argsort(rows, kind="stable")  # equal rows beside each other, in source order
    ordered = rows[order]
    del rows  # there may be very many
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    del ordered
    starts = np.flatnonzero(first)
    sizes = np.diff(starts, append=len(order)) if keep_duplicates else np.ones_like(starts)
    ranked = _ranked(seed, digests, order[starts])
    border = validation_groups(len(starts), share)
    validation, training = (
        order[_ranges(starts[groups], sizes[groups])]
        for groups in (ranked[:border], ranked[border:])
    )
    duplicates = order[:0] if keep_duplicates else np.sort(order[~first])
    return Split(training, validation, duplicates)


def _ranked(seed: int, digests: Sequence[bytes], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """``rows`` by their places in the split, as indices into ``rows``."""
    places = bytearray()
    for row in rows:
        places += _place(seed, digests[int(row)])
    ranked: NDArray[np.int64] = np.argsort(np.frombuffer(places, dtype="S32"), kind="stable")
    return ranked


def _ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... of each, one after the other."""
    before = np.cumsum(sizes) - sizes
    found: NDArray[np.int64] = np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
    return found


def _place(seed: int, digest: bytes) -> bytes:
    return hashlib.sha256(b"%d:" % seed + digest).digest()
