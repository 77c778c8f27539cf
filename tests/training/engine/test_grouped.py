"""The grouped tier's arithmetic, beyond what test_exact.py holds against the loop's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.engines import Bench

pytestmark = pytest.mark.model


def slots_and_units(bench: Bench, warm: Any, dropout: float) -> tuple[list[Any], list[Any]]:
    """Three jobs whose scale, a third, is no number of bf16."""
    import torch

    from llamahome.config import parse_training_config
    from llamahome.training.engine.draws import DropKey
    from llamahome.training.engine.passes import make_unit

    slots, units = [], []
    for index in range(3):
        lora = {"r": 24, "alpha": 8, "dropout": dropout, "target_modules": ["down_proj"]}
        slot = warm.slot_for(parse_training_config(bench.spec(lora=lora).config, source="test"))
        with torch.no_grad():
            slot.weights.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
        slot.refresh()
        slots.append(slot)
        units.append(
            make_unit(
                slot, bench.data.training, range(index, 11, 3), weight=1.0, learns=True,
                drops=DropKey(index, 0, 0),
            )
        )  # fmt: skip
    return slots, units


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_scale_that_bf16_rounds_is_applied_in_fp32(
    make_bench: Callable[..., Bench], dropout: float
) -> None:
    """Rounded to bf16 it would be 0.2 % too large in every product: a bias, not noise."""
    import torch

    from llamahome.training.engine.passes import make_pass

    bench = make_bench("bf16")
    engine = bench.engine()
    engine.warm.board.tier = "grouped"
    slots, units = slots_and_units(bench, engine.warm, dropout)
    site = engine.warm.site("model.layers.0.mlp.down_proj")
    whole = make_pass(units, 16, torch.device("cpu"))
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(len(whole.ids), 64, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(len(whole.ids), 32, generator=generator).bfloat16()
    with engine.warm.board.showing(whole.segments, len(whole.ids)):
        assert engine.warm.board.grouping is not None
        factors = engine.warm.board.grouping.factors
        mask = site.mask(len(whole.ids), x.device)
        y = site(x)
        y.backward(upstream)
    engine.close()

    keep = 1.0 if dropout == 0 else slots[0].dropout.keep
    assert factors.dtype is torch.float32
    assert float(factors[0]) == pytest.approx(1 / 3 / keep, rel=1e-7)
    dropped = x.detach().double() if mask is None else x.detach().double() * mask
    dot = {"a": 0.0, "b": 0.0}
    square = {"a": 0.0, "b": 0.0}
    for segment, slot in zip(whole.segments, slots, strict=True):
        mine = slice(segment.start, segment.end)
        pair, dy = slot.pairs[site.shape.name], upstream[mine].double()
        h = dropped[mine] @ pair.a.double().t()
        expected = {
            "b": (dy.t() @ h) / 3 / keep,
            "a": ((dy @ pair.b.double()) / 3 / keep).t() @ dropped[mine],
        }
        for name, grad in (("a", pair.grad_a), ("b", pair.grad_b)):
            dot[name] += float((grad.double() * expected[name]).sum())
            square[name] += float((expected[name] ** 2).sum())
    for name in ("a", "b"):
        assert dot[name] / square[name] == pytest.approx(1.0, abs=5e-4), name
