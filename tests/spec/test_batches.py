"""``TrainingData.dataloaders``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import InvalidState
from llamahome.local import TrainingData

from .conftest import QUICK, MakeData, contents

pytestmark = pytest.mark.model


def rows_of(loader: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in loader for row in batch["input_ids"]]


def prepared(root: Path, **config: Any) -> TrainingData:
    """Sizes go to the constructor."""
    sizes = {k: config.pop(k) for k in ("batch_size", "max_workers") if k in config}
    manager = TrainingData(root, config={**QUICK, **config}, **sizes)
    asyncio.run(manager.process_samples())
    return manager


def test_batches_have_the_size_asked_for_and_the_last_may_be_small(make_data: MakeData) -> None:
    """BEHAVIOUR 20, 61: batch_size=16 of the constructor makes batches of 16; the last partial one
    is kept; a size above the number of rows gives one batch."""
    root = make_data("flat", rows=40)
    loaders = prepared(root, batch_size=16).dataloaders()
    assert [batch["labels"].shape for batch in loaders.training] == [(16, 64), (16, 64), (4, 64)]
    assert [len(batch["labels"]) for batch in loaders.validation] == [4]
    large = TrainingData(root, batch_size=100, config=QUICK).dataloaders()
    assert [len(batch["labels"]) for batch in large.training] == [36]


def test_training_rows_are_shuffled_by_the_seed_and_validation_rows_are_not(
    make_data: MakeData,
) -> None:
    """BEHAVIOUR 61: each epoch another order, the same for the same seed and the one training
    takes; validation in the set's order."""
    from llamahome.training.data import epoch_order

    root = make_data("flat", rows=40)
    manager = prepared(root)
    loaders, again = manager.dataloaders(), manager.dataloaders()
    first, second = rows_of(loaders.training), rows_of(loaders.training)
    assert first != second
    assert sorted(first) == sorted(second)
    assert [rows_of(again.training) for _ in range(2)] == [first, second]
    in_order: Any = loaders.training.dataset
    rows = [tuple(in_order[index]["input_ids"].tolist()) for index in range(len(in_order))]
    assert first == [rows[index] for index in epoch_order(36, 42, 0)]
    held: Any = loaders.validation.dataset
    assert rows_of(loaders.validation) == [
        tuple(held[index]["input_ids"].tolist()) for index in range(len(held))
    ]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_more_loader_processes_give_the_same_batches(make_data: MakeData) -> None:
    """BEHAVIOUR 62: max_workers loader processes, bounded by processors and batches; one is this
    process; the content is the same."""
    root = make_data("flat", rows=40)
    prepared(root, max_workers=3)
    place = root / "processed"
    before = contents(place)
    manager = prepared(root, max_workers=1)
    assert contents(place) == before
    alone = manager.dataloaders()
    assert alone.training.num_workers == 0
    many = TrainingData(root, max_workers=64, config=QUICK).dataloaders()
    assert many.training.num_workers in (0, min(9, len(os.sched_getaffinity(0))))
    assert many.validation.num_workers == 0  # a single batch
    two = TrainingData(root, max_workers=2, config=QUICK).dataloaders()
    assert rows_of(two.training) == rows_of(alone.training) == rows_of(many.training)


def test_a_set_is_read_as_it_was_made_or_not_at_all(make_data: MakeData) -> None:
    """BEHAVIOUR 12, 62: loaders for other settings are refused; a pickled dataset finds out that
    another set came into the place of its own."""
    import pickle

    root = make_data("flat", rows=40)
    loaders = prepared(root).dataloaders()
    pickled = pickle.dumps(loaders.training.dataset)
    first = loaders.training.dataset[0]["input_ids"].tolist()
    assert pickle.loads(pickled)[0]["input_ids"].tolist() == first
    with pytest.raises(InvalidState, match=r"seed \(42, now 1\)"):
        TrainingData(root, config={**QUICK, "seed": 1}).dataloaders()
    prepared(root, seed=1)
    assert loaders.training.dataset[0]["input_ids"].tolist() == first
    with pytest.raises(InvalidState, match="replaced"):
        pickle.loads(pickled)[0]


def test_without_a_prepared_set_there_are_no_loaders(make_data: MakeData) -> None:
    """BEHAVIOUR 9: the remedy is named here, too."""
    with pytest.raises(InvalidState, match="process_samples"):
        TrainingData(make_data("flat")).dataloaders()
