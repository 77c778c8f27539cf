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


def evaluation_due(step: int, plan: Plan, config: TrainingConfig) -> bool:
    """After ``step`` steps: before training, at the end, and each epoch or ``eval_steps``."""
    if step in (0, plan.total_steps):
        return True
    return step % (config.eval_steps or plan.steps_per_epoch) == 0


def checkpoint_due(step: int, plan: Plan, config: TrainingConfig) -> bool:
    """After ``step`` steps, apart from evaluations, at each of which one is written."""
    if step == 0:
        return False
    settings = config.checkpointing
    every = plan.steps_per_epoch if settings.save_strategy == "epoch" else settings.save_steps
    return step == plan.total_steps or step % every == 0
