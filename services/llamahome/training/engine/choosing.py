"""Which jobs' work goes into the next pass: fair by tokens, no more than the pass should hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamahome.training.model import LoadedBase

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

    The job that has had the fewest tokens goes first and always gets its next unit in; after it,
    again and again, whichever has then had the fewest, while units fit the budget of tokens.
    """
    taken = [0] * len(offers)
    had = [mine[0].virtual if mine else 0 for mine in offers]
    family, room = None, budget
    open_to = {index for index, mine in enumerate(offers) if mine}
    while open_to:
        index = min(open_to, key=lambda one: (had[one], offers[one][0].admitted))
        offer = offers[index][taken[index]]
        if family is None:
            family = offer.family
        elif offer.family != family or offer.tokens > room:
            open_to.discard(index)
            continue
        taken[index] += 1
        had[index] += offer.tokens
        room -= offer.tokens
        if taken[index] == len(offers[index]):
            open_to.discard(index)
    return taken


def start_virtual(others: Sequence[int]) -> int:
    """The tokens a new job is taken to have had: the least of the others, not zero, or it would
    hold them up until it has caught up with their past."""
    return min(others, default=0)


def default_tick_tokens(loaded: LoadedBase) -> int:
    """Where more tokens in a pass no longer make it faster: modelled for GPUs, not measured there;
    on a CPU packing gains little, and the limit keeps a pass's memory small."""
    if loaded.device.type != "cuda":
        return 1024
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return 2048 if parameters > 5e9 else 8192
