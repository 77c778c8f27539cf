"""Which rows share a pack of ``capacity`` tokens, planned on their lengths alone.

Best fit decreasing: the longest rows first, each into the fullest pack that still has room (D. S.
Johnson, 1973: at most 11/9 of the best plus 6/9 of a pack). A plan, not a mask: whoever uses it
keeps the rows of a pack apart by their boundaries.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Pack ``i`` holds the rows ``rows[offsets[i]:offsets[i + 1]]``, the longest first.

    ``offsets`` int64 [packs + 1], ``rows`` int64 [rows], every row once.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    capacity: int
    tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """Tokens by room, in 0..1; 1 where there is no pack."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0


def plan_packs(lengths: NDArray[np.int64], *, capacity: int) -> Packs:
    """Rows of these ``lengths`` [rows] in packs. Raises ValueError where one is longer than a pack.

    A function of the lengths and their order alone: equal lengths stay in order, and packs are
    numbered as they were opened.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row of {int(lengths.max())} tokens, a pack of {capacity}")
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r: some open pack has exactly r tokens of room
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        if left := room - length:
            with_room[left].append(pack)
            rooms |= 1 << left
    sizes = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    rows = np.array([row for pack in packs for row in pack], dtype=np.int64)
    return Packs(sizes, rows, capacity, int(lengths.sum()))


def write_packs(path: Path, packs: Packs) -> None:
    """One safetensors file: ``pack_offsets`` int64 [packs + 1], ``pack_rows`` int64 [rows].

    Raises OSError.
    """
    tensors = {"pack_offsets": packs.offsets, "pack_rows": packs.rows}
    path.write_bytes(safetensors.numpy.save(tensors, {"capacity": str(packs.capacity)}))
