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


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Indices into the rows given, each side in split order; ``duplicates`` are in neither."""

    training: tuple[int, ...]
    validation: tuple[int, ...]
    duplicates: tuple[int, ...] = ()


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
    """Split rows by their canonical digests, which come in source order.

    Equal rows stay together, in source order; without ``keep_duplicates`` only the first is kept.
    """
    groups: dict[bytes, list[int]] = {}
    duplicates: list[int] = []
    for index, digest in enumerate(digests):
        group = groups.setdefault(digest, [])
        if group and not keep_duplicates:
            duplicates.append(index)
        else:
            group.append(index)
    ordered = sorted(groups, key=lambda digest: _place(seed, digest))
    border = validation_groups(len(ordered), share)
    validation = [index for digest in ordered[:border] for index in groups[digest]]
    training = [index for digest in ordered[border:] for index in groups[digest]]
    return Split(tuple(training), tuple(validation), tuple(duplicates))


def _place(seed: int, digest: bytes) -> bytes:
    return hashlib.sha256(b"%d:" % seed + digest).digest()
