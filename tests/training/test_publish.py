"""What goes with an adapter: the tokenizer it was trained with, with all its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llamahome.schemas import StageTask, TrainingMetrics, TrainingReport
from llamahome.training.publish import assemble_report, complete_adapter

TRAINED = TrainingReport(
    steps=1, epochs=1, seed=0, eval_loss_before=None, eval_loss_after=None, trained_tokens=1,
    trainable_parameters=1, base_unchanged=True, adapter_moved=True, precision="fp32",
    mode="full",
    metrics=TrainingMetrics(train_loss=1, eval_loss=None, learning_rate=0.1, epoch=1, step=1),
)  # fmt: skip


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_has_every_file_of_its_tokenizer(
    make_task: Callable[..., StageTask], prepared_folder: Path, tmp_path: Path, merged: bool
) -> None:
    prepared = tmp_path / "prepared"
    shutil.copytree(prepared_folder, prepared)
    more = prepared / "tokenizer" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("T")
    task = make_task()
    report = assemble_report(task, tmp_path / "validation", prepared, TRAINED)
    folder = tmp_path / "adapter"
    folder.mkdir()
    if merged:
        (folder / "merged").mkdir()
    complete_adapter(folder, task.spec, prepared, report)
    for target in (folder, folder / "merged") if merged else (folder,):
        assert (target / "additional_chat_templates" / "tool_use.jinja").read_text() == "T"
        assert (target / "tokenizer.json").is_file()
