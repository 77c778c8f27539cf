from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.model

GB = 1_000_000_000


@pytest.fixture
def make_memory() -> Any:
    import torch

    from llamahome.training.engine.memory import MemoryModel, Shape

    def make(limit: int | None = None, **changes: int) -> Any:
        llama_8b = {"layers": 32, "hidden": 4096, "intermediate": 14336, "element_bytes": 2}
        return MemoryModel(Shape(**llama_8b | changes), torch.device("cpu"), limit)

    return make


def test_an_8b_and_a_1b_llama_take_what_was_measured_a_token(make_memory: Any) -> None:
    large = make_memory(limit=GB).needs(1, 0)
    small = make_memory(GB, layers=16, hidden=2048, intermediate=8192).needs(1, 0)

    assert large == pytest.approx(4.46e6, rel=0.05)
    assert small == pytest.approx(1.21e6, rel=0.05)


def test_as_few_layers_are_recomputed_as_make_it_fit(make_memory: Any) -> None:
    assert make_memory(100 * GB).layers_to_recompute(8192, 32) == 0
    for limit in (30 * GB, 20 * GB, 10 * GB, 5 * GB):
        memory = make_memory(limit)
        layers = memory.layers_to_recompute(8192, 32)
        assert memory.needs(8192, layers) <= limit < memory.needs(8192, layers - 1)
    assert make_memory(GB).layers_to_recompute(8192, 32) == 32


def test_a_limit_set_by_hand_is_kept_to(make_memory: Any) -> None:
    import torch

    memory = make_memory(5 * GB)
    memory.enforce(1000, 0)
    with pytest.raises(torch.OutOfMemoryError, match="takes 8650752000 bytes"):
        memory.enforce(2000, 0)
    memory.enforce(2000, 32)


def test_it_learns_from_a_pass_that_took_more_and_forgets_nothing_for_one_that_took_less(
    make_memory: Any,
) -> None:
    memory = make_memory(100 * GB)
    before = memory.needs(8192, 0)
    memory.observe(8192, 0, 2 * before)
    assert memory.needs(8192, 0) == pytest.approx(2 * before)
    memory.observe(8192, 0, before // 2)
    memory.observe(16, 0, 10 * before)  # too small to tell
    assert memory.needs(8192, 0) == pytest.approx(2 * before)
