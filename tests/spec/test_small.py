"""The least there can be to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamahome.config import parse_training_config
from llamahome.errors import InvalidData
from llamahome.local import ProgressCallback, base_of_folder, train_files

from .conftest import QUICK, conversation, write_samples

pytestmark = pytest.mark.model


def config(**changes: Any) -> Any:
    wishes = {**QUICK, "batch_size": 4, "gradient_accumulation_steps": 4, **changes}
    return parse_training_config(wishes, source="test")


def test_a_single_sample_trains_a_step_an_epoch(tiny_folder: Path, tmp_path: Path) -> None:
    """BEHAVIOUR 77, 71, 72: fewer rows than batch x accumulation are a step all the same; without a
    validation side nothing stops early; ProgressCallback watches a run in this process."""
    files = [write_samples(tmp_path / "samples", [conversation(1)])]
    callback = ProgressCallback()
    done = train_files(
        files, base_of_folder(tiny_folder), tmp_path / "out", config=config(epochs=3),
        callbacks=[callback],
    )  # fmt: skip
    report = done.report
    assert (report.preparation.training.rows, report.preparation.validation.rows) == (1, 0)
    assert report.training.steps == 3
    assert report.training.adapter_moved
    assert (report.training.eval_loss_after, report.training.stopped_early) == (None, None)
    assert [(task.completed, task.total) for task in callback.progress.tasks] == [(3, 3), (1, 1)]


def test_early_stopping_stops_at_the_patience_th_evaluation(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 71: with min_delta beyond any gain, patience 2 stops two evaluations after
    the first, says why, and keeps the best weights; the callback has stopped where it was."""
    files = [write_samples(tmp_path / "samples", map(conversation, range(8)))]
    stopping = {"enabled": True, "patience": 2, "min_delta": 100.0}
    callback = ProgressCallback()
    done = train_files(
        files, base_of_folder(tiny_folder), tmp_path / "out",
        config=config(epochs=9, early_stopping=stopping), callbacks=[callback],
    )  # fmt: skip
    training = done.report.training
    assert training.steps == 3
    assert training.stopped_early
    assert "2" in training.stopped_early
    assert training.best_step in (1, 2, 3)
    assert [(task.completed, task.total) for task in callback.progress.tasks][0] == (3, 9)


def test_nothing_to_train_on_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    """BEHAVIOUR 77: an empty file is refused; the base, which is none, was never opened."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    files = [write_samples(tmp_path / "samples", [])]
    with pytest.raises(InvalidData, match="empty"):
        train_files(files, base_of_folder(base), tmp_path / "out", config=config())
    assert not (tmp_path / "out").exists()
