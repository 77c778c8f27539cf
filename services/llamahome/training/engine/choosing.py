"""Which jobs' work goes into the next pass: fair by tokens, no more than the pass should hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

LONG_ROW_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a job would have done next: so many ``tokens`` in rows of at most ``longest``.

    ``virtual`` are the tokens the job has had so far (see :func:`start_virtual`); only offers of
    equal ``kind`` may share a pass.
    """

    virtual: int
    admitted: int
    kind: Hashable
    tokens: int
    longest: int

    @property
    def family(self) -> tuple[Hashable, bool]:
        """Long rows go apart: a short one beside them would wait for their attention."""
        return self.kind, self.longest >= LONG_ROW_TOKENS


def choose(offers: Sequence[Sequence[Offer]], budget: int) -> list[int]:
    """How many of each job's offers, from the front, to take into one pass.

    The job that has had the fewest tokens goes first and always gets its next unit in; the others
    follow, one unit each in turn, while the units fit the budget of tokens.
    """
    taken = [0] * len(offers)
    waiting = [index for index, mine in enumerate(offers) if mine]
    if not waiting:
        return taken
    waiting.sort(key=lambda index: (offers[index][0].virtual, offers[index][0].admitted))
    family = offers[waiting[0]][0].family
    room = budget
    while waiting:
        still = []
        for index in waiting:
            offer = offers[index][taken[index]]
            first = room == budget
            if offer.family != family or not (first or offer.tokens <= room):
                continue
            taken[index] += 1
            room -= offer.tokens
            if taken[index] < len(offers[index]):
                still.append(index)
        waiting = still
    return taken


def start_virtual(others: Sequence[int]) -> int:
    """The tokens a new job is taken to have had: the least of the others, not zero, or it would
    hold them up until it has caught up with their past."""
    return min(others, default=0)
