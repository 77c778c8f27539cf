"""DataLoaders over a prepared set."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler

from llamahome.config import TrainingConfig
from llamahome.conversations.tokenizer import ChatTokenizer
from llamahome.local.dataset import Item, TokenRowsDataset
from llamahome.local.tokenizers import pad_id
from llamahome.training.data import TRAINING_FILE, VALIDATION_FILE, epoch_order


class DataLoaders(NamedTuple):
    """Batches of ``input_ids``, ``attention_mask`` and ``labels``, int64 [batch, max_length]."""

    training: DataLoader[Item]
    validation: DataLoader[Item]


class EpochSampler(Sampler[int]):
    """Each iteration is the next epoch, in the order in which training takes its rows."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self._rows, self._seed, self.epoch)
        self.epoch += 1
        return iter(order.tolist())


def make_dataloaders(folder: Path, config: TrainingConfig) -> DataLoaders:
    """Loaders over the set in ``folder``; the last batch of each may be a small one.

    ``max_workers`` processes load them, but no more than there are processors or batches; 1 means
    that this process does it, and so does a set of one batch. Raises CorruptArtifact, OSError.
    """
    pad = pad_id(ChatTokenizer.load(folder / "tokenizer"))
    training, validation = (
        TokenRowsDataset(folder / name, max_length=config.max_length, pad_id=pad)
        for name in (TRAINING_FILE, VALIDATION_FILE)
    )
    return DataLoaders(
        _loader(training, config, sampler=EpochSampler(len(training), config.seed)),
        _loader(validation, config),
    )


def _loader(data: TokenRowsDataset, config: TrainingConfig, **options: Any) -> DataLoader[Item]:
    batches = math.ceil(len(data) / config.batch_size)
    workers = min(config.max_workers, len(os.sched_getaffinity(0)), batches)
    return DataLoader(
        data,
        batch_size=config.batch_size,
        num_workers=workers if workers > 1 else 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )
