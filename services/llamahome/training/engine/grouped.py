"""All adapters of one layer in a few launches, however many jobs there are (``F.grouped_mm``).

The arithmetic is that of ``lora.py``; only the order of sums differs. What the kernels ask for:
ranks are filled up with zeros to a multiple of 8, no group is empty, the last group reaches to the
last row, and gradients that come in are contiguous.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from llamahome.training.engine.passes import Segment
from llamahome.training.engine.slots import Slot

_RANK_MULTIPLE = 8
_WORTH_GROUPS = 3  # up to two, a slice and a product for each are no more launches


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which rows of a pass belong to which slot: group g ends before row ``ends[g]``.

    ``factors`` [T, 1], in fp32 whatever the base's type, is what each row's part is multiplied by
    (scale, over what dropout keeps): rounded to bf16 it would be a bias of up to 0.4 %.
    """

    slots: tuple[Slot, ...]
    ends: torch.Tensor
    factors: torch.Tensor
    rank: int

    @property
    def key(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever the weights of a slot, or the slots, do."""
        return tuple((slot.serial, slot.version) for slot in self.slots)


def is_worth_grouping(
    segments: Sequence[Segment], device: torch.device, dtype: torch.dtype
) -> bool:
    """True on devices where the grouped product is one kernel, with jobs enough to pay for it."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return len({id(segment.unit.slot) for segment in segments}) >= _WORTH_GROUPS


def group(segments: Sequence[Segment], rows: int) -> Grouping:
    """Segments of one slot side by side are one group; the last goes on to row ``rows``."""
    slots: list[Slot] = []
    ends: list[int] = []
    device = segments[0].unit.slot.gradient.device
    factors = torch.zeros(rows, 1)
    for segment in segments:
        slot = segment.unit.slot
        drops = segment.unit.drops is not None and slot.dropout.level > 0
        factors[segment.start : segment.end] = slot.scale / (slot.dropout.keep if drops else 1.0)
        if slots and slots[-1] is slot:
            ends[-1] = segment.end
        else:
            slots.append(slot)
            ends.append(segment.end)
    ends[-1] = rows
    most = max(slot.rank for slot in slots)
    rank = math.ceil(most / _RANK_MULTIPLE) * _RANK_MULTIPLE
    offsets = torch.tensor(ends, dtype=torch.int32).to(device)
    return Grouping(tuple(slots), offsets, factors.to(device), rank)


class Stacks:
    """One layer's adapters side by side: A [groups, rank, in] and B [groups, out, rank].

    A slot without an adapter on the layer has zeros. Kept until a slot learns or the groups change.
    """

    def __init__(self, name: str, columns: int, rows: int) -> None:
        self._name, self._columns, self._rows = name, columns, rows
        self._key: tuple[tuple[int, int], ...] = ()
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, grouping: Grouping, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kept is None or self._key != grouping.key:
            groups = len(grouping.slots)
            a = like.new_zeros(groups, grouping.rank, self._columns)
            b = like.new_zeros(groups, self._rows, grouping.rank)
            for index, slot in enumerate(grouping.slots):
                if (pair := slot.pairs.get(self._name)) is not None:
                    a[index, : slot.rank] = pair.a
                    b[index, :, : slot.rank] = pair.b
            self._key, self._kept = grouping.key, (a, b)
        return self._kept


class GroupedLora(torch.autograd.Function):
    """As ``_Lora`` of lora.py, over all groups at once. ``masked`` is x with dropout's zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        site: Any,
        grouping: Grouping,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = site.stacks.of(grouping, flat)
        mask = site.mask(len(flat), flat.device)
        masked = flat if mask is None else flat * mask
        h = functional.grouped_mm(masked, a.transpose(1, 2), offs=grouping.ends)
        h = (h * grouping.factors).to(h.dtype)
        y = functional.linear(flat, site.weight, bias)
        y += functional.grouped_mm(h, b.transpose(1, 2), offs=grouping.ends)
        ctx.site, ctx.grouping, ctx.shape = site, grouping, x.shape
        ctx.save_for_backward(flat, h)
        # As in lora.py: no view.
        shaped: torch.Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
        return shaped

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, h = ctx.saved_tensors
        site, grouping = ctx.site, ctx.grouping
        (upstream,) = gradients
        dy = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        a, b = site.stacks.of(grouping, flat)
        mask = site.mask(len(flat), flat.device)
        masked = flat if mask is None else flat * mask
        dh = functional.grouped_mm(dy, b, offs=grouping.ends)
        dh = (dh * grouping.factors).to(dh.dtype)
        db = functional.grouped_mm(dy.t(), h, offs=grouping.ends)
        da = functional.grouped_mm(dh.t(), masked, offs=grouping.ends)
        _add_to_slots(site.shape.name, grouping, da, db)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        dx = dy @ site.weight
        part = functional.grouped_mm(dh, a, offs=grouping.ends)
        dx += part if mask is None else part * mask
        return dx.view(ctx.shape), None, None, None, None


def _add_to_slots(name: str, grouping: Grouping, da: torch.Tensor, db: torch.Tensor) -> None:
    """Into each slot's own gradient, in its own type."""
    into, parts = [], []
    for index, slot in enumerate(grouping.slots):
        if (pair := slot.pairs.get(name)) is None:
            continue
        into += [pair.grad_a, pair.grad_b]
        parts += [da[index, : slot.rank], db[index, :, : slot.rank]]
    torch._foreach_add_(into, [part.to(grad.dtype) for grad, part in zip(into, parts, strict=True)])
