from __future__ import annotations

import math

import numpy as np
import pytest

from llamahome.config import TrainingConfig
from llamahome.training.data import epoch_order
from llamahome.training.schedule import (
    Due,
    Plan,
    due_after_epoch,
    due_after_step,
    learning_rate,
)


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate(changes)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [(1, 4, 4, 3), (11, 2, 2, 2), (12, 2, 3, 1), (100, 4, 4, 3), (7, 8, 1, 5)],
)
def test_steps_are_windows_of_batches_rounded_up_in_every_epoch(
    rows: int, batch: int, accumulation: int, epochs: int
) -> None:
    """BEHAVIOUR 68, 77: steps = ceil(ceil(n / batch) / accumulation) x epochs, one at least."""
    plan = Plan(rows, batch, accumulation, epochs, seed=1)

    assert plan.total_steps == math.ceil(math.ceil(rows / batch) / accumulation) * epochs


def test_every_row_is_taken_once_in_every_epoch_and_the_last_partial_batch_is_kept() -> None:
    """BEHAVIOUR 61: the last partial batch is trained on."""
    plan = Plan(rows=11, batch_size=2, accumulation=2, epochs=2, seed=7)

    for epoch in range(2):
        first = epoch * plan.steps_per_epoch
        windows = [plan.micro_batches(step) for step in range(first, first + plan.steps_per_epoch)]
        sizes = [[len(batch) for batch in window] for window in windows]
        assert sizes == [[2, 2], [2, 2], [2, 1]]
        taken = [int(row) for window in windows for batch in window for row in batch]
        assert sorted(taken) == list(range(11))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    orders = {
        (seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in (0, 42) for epoch in (0, 1)
    }
    epoch_order.cache_clear()

    assert len(set(orders.values())) == 4
    for (seed, epoch), order in orders.items():
        assert tuple(epoch_order(50, seed, epoch)) == order


def test_the_order_is_the_one_that_old_checkpoints_count_on() -> None:
    # Frozen: another order would make a resumed run skip some rows and repeat others.
    assert epoch_order(10, 42, 0).tolist() == [6, 2, 5, 7, 0, 9, 4, 3, 8, 1]


def test_epochs_are_counted_from_one_and_zero_is_before_the_first() -> None:
    plan = Plan(rows=11, batch_size=2, accumulation=2, epochs=2, seed=7)

    assert [plan.epoch_of(step) for step in range(7)] == [0, 1, 1, 1, 2, 2, 2]


def test_the_rate_rises_over_the_warm_up_and_then_falls_and_is_never_zero() -> None:
    """BEHAVIOUR 68: the rate falls after the warm-up."""
    settings = config(learning_rate=1.0, warmup_steps=4)

    rates = [learning_rate(step, 10, settings) for step in range(10)]

    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_the_cosine_falls_by_its_own_curve_and_constant_stays() -> None:
    cosine = config(learning_rate=1.0, warmup_steps=0, lr_scheduler="cosine")
    constant = config(learning_rate=1.0, warmup_steps=0, lr_scheduler="constant")

    rates = [learning_rate(step, 4, cosine) for step in range(4)]

    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    assert {learning_rate(step, 4, constant) for step in range(4)} == {1.0}


def test_a_run_shorter_than_its_warm_up_still_learns() -> None:
    assert learning_rate(0, 1, config(learning_rate=1.0, warmup_steps=100)) == 0.01


def due_after(step: int, plan: Plan, settings: TrainingConfig) -> Due:
    return due_after_step(step, step, plan, settings) | due_after_epoch(step, plan, settings)


def test_evaluations_are_at_the_start_at_each_epoch_and_at_the_end() -> None:
    plan = Plan(rows=11, batch_size=2, accumulation=2, epochs=2, seed=7)

    def due(settings: TrainingConfig) -> list[int]:
        return [step for step in range(7) if due_after(step, plan, settings).evaluate]

    assert due(config()) == [0, 3, 6]
    assert due(config(eval_steps=4)) == [0, 4, 6]


def test_checkpoints_are_at_each_epoch_or_every_so_many_steps_and_at_the_end() -> None:
    plan = Plan(rows=11, batch_size=2, accumulation=2, epochs=2, seed=7)

    def due(settings: TrainingConfig) -> list[int]:
        return [step for step in range(7) if due_after(step, plan, settings).save]

    assert due(config()) == [3, 6]
    assert due(config(checkpointing={"save_strategy": "steps", "save_steps": 4})) == [4, 6]


def test_the_order_cannot_be_changed_through_the_cache() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 42, 0)[0] = 5
    assert epoch_order(10, 42, 0).dtype == np.int64
