"""How many steps there are, which rows each takes, and how fast it learns: pure functions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from llamahome.config import TrainingConfig
from llamahome.training.data import epoch_order


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole run, known before it starts; steps are optimizer steps, counted from 0."""

    rows: int
    batch_size: int
    accumulation: int
    epochs: int
    seed: int

    @classmethod
    def of(cls, config: TrainingConfig, rows: int) -> Plan:
        return cls(
            rows, config.batch_size, config.gradient_accumulation_steps, config.epochs, config.seed
        )

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """The last window of an epoch may be short: no step mixes two epochs."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """The epoch (from 1) that step number ``step`` (from 1) belongs to; 0 before the first."""
        return math.ceil(step / self.steps_per_epoch)

    def micro_batches(self, step: int) -> list[NDArray[np.int64]]:
        """The row numbers of each micro-batch of step ``step`` (from 0)."""
        epoch, window = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.rows, self.seed, epoch)
        first = window * self.accumulation
        last = min(first + self.accumulation, self.batches_per_epoch)
        size = self.batch_size
        return [order[batch * size : (batch + 1) * size] for batch in range(first, last)]


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of step ``step`` (from 0): linear warm-up, then the scheduler's decay.

    Warm-up is (step + 1) / warmup_steps, so that no step has rate 0 and a run of one step learns;
    it reaches the configured rate at its last step. The decay is over the steps that remain.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (1.0 - done)


@dataclasses.dataclass(frozen=True)
class Due:
    """What is to be done between two steps; ``save`` apart from evaluations, which all save."""

    evaluate: bool = False
    save: bool = False

    def __or__(self, other: Due) -> Due:
        return Due(self.evaluate or other.evaluate, self.save or other.save)


def due_after_step(step: int, place: int, plan: Plan, config: TrainingConfig) -> Due:
    """What the settings in steps ask for after ``step`` steps, and at the end.

    ``place`` is where the run is in its plan: beyond ``step`` by the steps that were left out.
    """
    settings, last = config.checkpointing, place == plan.total_steps
    return Due(
        evaluate=config.eval_steps is not None and (last or step % config.eval_steps == 0),
        save=settings.save_strategy == "steps"
        and step > 0
        and (last or step % settings.save_steps == 0),
    )


def due_after_epoch(place: int, plan: Plan, config: TrainingConfig) -> Due:
    """What the settings in epochs ask for at ``place``: at the end of each, and before the first
    (where nothing is saved)."""
    ends = place % plan.steps_per_epoch == 0
    by_epoch = config.checkpointing.save_strategy == "epoch"
    return Due(evaluate=ends and config.eval_steps is None, save=ends and place > 0 and by_epoch)
