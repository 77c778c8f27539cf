"""Packs: every row once, nothing too full, the plan a function of lengths alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from llamahome.conversations.packing import plan_packs, write_packs


def packed(lengths: list[int], capacity: int) -> list[list[int]]:
    plan = plan_packs(np.array(lengths, dtype=np.int64), capacity=capacity)
    return [plan.rows[a:b].tolist() for a, b in zip(plan.offsets, plan.offsets[1:], strict=False)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
def test_every_row_is_in_one_pack_and_no_pack_is_too_full(lengths: list[int], room: int) -> None:
    packs = packed(lengths, room)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in pack) <= room for pack in packs)
    # Best fit leaves no two packs that fit into one, but where the second came first.
    assert len(packs) <= max(1, -(-2 * sum(lengths) // room))


def test_the_fullest_pack_with_room_is_taken() -> None:
    assert packed([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert packed([7, 6, 3, 4, 2], 10) == [[0, 2], [1, 3], [4]]
    assert packed([10, 10], 10) == [[0], [1]]
    assert packed([], 10) == []


def test_equal_lengths_stay_in_order_and_the_plan_is_the_same_each_time() -> None:
    assert packed([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    lengths = np.random.default_rng(3).integers(1, 512, 5000)
    one, two = (plan_packs(lengths, capacity=512) for _ in range(2))
    assert np.array_equal(one.rows, two.rows)
    assert one.fill > 0.995


def test_a_row_longer_than_a_pack_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="a row of 11 tokens, a pack of 10"):
        packed([11], 10)


def test_the_file_holds_the_plan(tmp_path: Path) -> None:
    plan = plan_packs(np.array([6, 5, 4, 3]), capacity=10)
    write_packs(tmp_path / "packs.safetensors", plan)
    found = safetensors.numpy.load_file(tmp_path / "packs.safetensors")
    assert found["pack_offsets"].tolist() == [0, 2, 4]
    assert found["pack_rows"].tolist() == [0, 2, 1, 3]
