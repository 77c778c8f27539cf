"""The linear layer with many adapters: one frozen product over all tokens, and each job's own part.

y = x W' ; for the tokens of segment j: y_j += c_j h_j B_j' with h_j = (m_j * x_j) A_j', where m is
the dropout mask (0 or 1) and c = scale / keep. Backward, by hand: dx = dy W; dB_j += c_j dy_j' h_j;
dh_j = c_j dy_j B_j; dA_j += dh_j' (m_j * x_j); dx_j += m_j * (dh_j A_j). No dW is ever formed, x is
saved once, and the gradients go straight into each slot's buffer (Hu et al. 2021 for LoRA).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llamahome.errors import OperatorError
from llamahome.training.engine.draws import keep_mask, masked
from llamahome.training.engine.grouped import (
    GroupedLora,
    Grouping,
    Stacks,
    group,
    is_worth_grouping,
)
from llamahome.training.engine.passes import Segment
from llamahome.training.engine.slots import Pair, SiteShape


class Board:
    """What the layers of a base read while a pass goes through it: whose tokens lie where.

    ``tier`` is ``loop`` (a slice and a product for each segment), ``grouped`` (grouped.py), or
    ``auto``: grouped where that is faster.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        # Without an input that wants a gradient, autograd would not call the first backward.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.segments: tuple[Segment, ...] = ()
        self.grouping: Grouping | None = None
        self.tier: Literal["auto", "loop", "grouped"] = "auto"
        self._device, self._dtype = device, dtype

    @contextmanager
    def showing(self, segments: tuple[Segment, ...], rows: int) -> Iterator[None]:
        """While the block lasts; ``rows`` are those of a pass, with what it is filled up with."""
        self.segments = segments
        grouped = self.tier == "grouped" or (
            self.tier == "auto" and is_worth_grouping(segments, self._device, self._dtype)
        )
        self.grouping = group(segments, rows) if grouped else None
        try:
            yield
        finally:
            self.segments, self.grouping = (), None


class LoraLinear:
    """Takes the place of a linear layer's ``forward``; the layer itself stays as it is."""

    def __init__(self, name: str, module: torch.nn.Module, board: Board) -> None:
        assert isinstance(module, (torch.nn.Linear, Conv1D))
        self.module, self.board = module, board
        rows, columns = self.weight.shape
        self.shape = SiteShape(name, columns, rows)
        self.stacks = Stacks(name, columns, rows)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; GPT-2 and its kin keep theirs as [in, out]."""
        weight: torch.Tensor = self.module.weight
        return weight.t() if isinstance(self.module, Conv1D) else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] over all tokens of the pass. Raises OperatorError for another number."""
        bias = self.module.bias
        segments = self.board.segments
        if not any(self.shape.name in segment.unit.slot.pairs for segment in segments):
            return functional.linear(x, self.weight, bias)
        if x.shape[:-1].numel() < segments[-1].end:
            raise OperatorError(
                f"layer {self.shape.name} is given {x.shape[:-1].numel()} of {segments[-1].end} "
                "tokens: this kind of base is not supported"
            )
        grouping = self.board.grouping
        if grouping is not None:
            grouped: torch.Tensor = GroupedLora.apply(x, self.board.anchor, self, grouping, bias)  # type: ignore[no-untyped-call]
            return grouped
        y: torch.Tensor = _Lora.apply(x, self.board.anchor, self, segments, bias)  # type: ignore[no-untyped-call]
        return y

    def mask(self, rows: int, device: torch.device) -> torch.Tensor | None:
        """Dropout's mask over the whole pass, bool [rows, in]; None where nothing is dropped."""
        name = self.shape.name
        parts = [
            _Part(self, segment)
            for segment in self.board.segments
            if name in segment.unit.slot.pairs
        ]
        if not any(part.drops for part in parts):
            return None
        whole = torch.ones(rows, self.shape.columns, dtype=torch.bool, device=device)
        for part in parts:
            if (mask := part.mask(device)) is not None:
                whole[part.segment.start : part.segment.end] = mask
        return whole


class _Part:
    """One segment in one layer.

    On a CPU the mask is kept for the backward pass, a quarter of what x takes there; on CUDA memory
    is dearer than a launch, and it is made again.
    """

    def __init__(self, site: LoraLinear, segment: Segment) -> None:
        self.segment, self.site = segment, site
        slot = segment.unit.slot
        self.pair: Pair = slot.pairs[site.shape.name]
        self.drops = segment.unit.drops is not None and slot.dropout.level > 0
        self.factor = slot.scale / slot.dropout.keep if self.drops else slot.scale

    def mask(self, device: torch.device) -> torch.Tensor | None:
        if not self.drops:
            return None
        unit, segment = self.segment.unit, self.segment
        assert unit.drops is not None
        rows = range(unit.first, unit.first + segment.end - segment.start)
        shape, of = self.site.shape, unit.micro_batch_tokens
        return keep_mask(unit.drops, shape.name, rows, of, shape.columns, unit.slot.dropout, device)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        site: LoraLinear,
        segments: tuple[Segment, ...],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = functional.linear(flat, site.weight, bias)
        parts, saved = [], []
        for segment in segments:
            if site.shape.name not in segment.unit.slot.pairs:
                continue
            part = _Part(site, segment)
            mine, mask = flat[segment.start : segment.end], part.mask(x.device)
            h = (mine if mask is None else masked(mine, mask)) @ part.pair.a.t()
            y[segment.start : segment.end].addmm_(h, part.pair.b.t(), alpha=part.factor)
            parts.append(part)
            saved += [h] if mask is None or mask.is_cuda else [h, mask]
        ctx.parts, ctx.site, ctx.shape = parts, site, x.shape
        ctx.save_for_backward(flat, *saved)
        # No view that autograd knows of: some models add to a layer's output in place.
        shaped: torch.Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
        return shaped

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, *saved = ctx.saved_tensors
        (upstream,) = gradients
        dy = upstream.reshape(-1, upstream.shape[-1])
        dx = dy @ ctx.site.weight if ctx.needs_input_grad[0] else None
        saved_values = iter(saved)
        for part in ctx.parts:
            h = next(saved_values)
            kept = part.drops and not dy.is_cuda
            mask = next(saved_values) if kept else part.mask(dy.device)
            start, end = part.segment.start, part.segment.end
            mine, dy_j = flat[start:end], dy[start:end]
            _add_product(part.pair.grad_b, dy_j.t(), h, part.factor)
            dh = torch.mm(dy_j, part.pair.b).mul_(part.factor)
            dropped = mine if mask is None else masked(mine, mask)
            _add_product(part.pair.grad_a, dh.t(), dropped, 1.0)
            if dx is None:
                continue
            if mask is None:
                dx[start:end].addmm_(dh, part.pair.a)
            else:
                dx[start:end] += masked(torch.mm(dh, part.pair.a), mask)
        return (None if dx is None else dx.view(ctx.shape), None, None, None, None)


def _add_product(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float) -> None:
    """``into += factor * a b``, where ``into`` may be of a wider type."""
    if into.dtype == a.dtype:
        into.addmm_(a, b, alpha=factor)
    else:
        into.add_(a @ b, alpha=factor)
