"""Files and an earlier adapter in, an adapter that goes on from it out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Settings, merge, parse_training_config
from llamahome.errors import InvalidConfig, InvalidData, InvalidState, NotFound
from llamahome.local import TrainedFiles, Watch, base_of_folder, read_adapter, train_files
from llamahome.local.inputs import StorageWithInputs
from llamahome.schemas import NewEvent, Stage

QUICK: dict[str, Any] = {
    "epochs": 1, "warmup_steps": 0, "learning_rate": 1e-3, "fp16": False,
    "lora": {"r": 2, "alpha": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, and an adapter."""
    from llamahome.training import make_tiny

    folder = tmp_path_factory.mktemp("place")
    make_tiny(folder / "base", steps=0)
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]}
        for n in range(20)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


Train = Callable[..., TrainedFiles]


@pytest.fixture(scope="module")
def train(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    def do(out: Path, adapter: Path | None = None, **changes: Any) -> TrainedFiles:
        resume, watch = changes.pop("resume", False), changes.pop("watch", None)
        below = QUICK if adapter is None else merge(QUICK, read_adapter(adapter).earlier.layer,
                                                    source="adapter")  # fmt: skip
        config = parse_training_config(merge(below, changes, source="test"), source="test")
        settings = Settings(device="cpu", threads=1, state=tmp_path_factory.mktemp("state"))
        return train_files(
            [place / "rows.jsonl"], base_of_folder(place / "base"), out, config=config,
            adapter=adapter, resume=resume, settings=settings, watch=watch,
        )  # fmt: skip

    return do


@pytest.fixture(scope="module")
def earlier(train: Train, tmp_path_factory: pytest.TempPathFactory) -> TrainedFiles:
    return train(tmp_path_factory.mktemp("earlier") / "out")


@pytest.mark.model
def test_files_are_trained_on_from_an_adapter_in_a_folder_and_merged(
    train: Train, earlier: TrainedFiles, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = train(tmp_path / "out", earlier.adapter, lora={"merge": True})

    assert done.report.training.eval_loss_before == earlier.report.training.eval_loss_after
    assert done.report.lineage["adapter"] == read_adapter(earlier.adapter).ref.digest
    merged = done.adapter / "merged"
    assert AutoModelForCausalLM.from_pretrained(merged).dtype is not None
    assert AutoTokenizer.from_pretrained(merged).chat_template
    again = train(tmp_path / "out", earlier.adapter, lora={"merge": True}, resume=True)
    assert not again.trained
    with pytest.raises(InvalidState, match="another adapter"):
        train(tmp_path / "out", resume=True, lora={"merge": True})


@pytest.mark.model
def test_an_adapter_that_names_another_base_is_warned_of(
    train: Train, earlier: TrainedFiles, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(earlier.adapter, copy)
    path = copy / "adapter_config.json"
    path.write_text(path.read_text().replace('"base"', '"meta/other"'))
    said: list[NewEvent] = []

    def event(stage: Stage, told: NewEvent) -> None:
        said.append(told)

    train(tmp_path / "out", copy, watch=Watch(event=event))
    (warning,) = [told.message for told in said if "goes on here" in told.message]
    assert "'meta/other'" in warning


@pytest.mark.model
def test_what_cannot_be_gone_on_from_is_refused_and_leaves_nothing(
    train: Train, earlier: TrainedFiles, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidConfig, match=r"is 8, but the adapter 'adapter' was trained with 2"):
        train(out, earlier.adapter, lora={"r": 8})
    with pytest.raises(NotFound, match=r"holds no adapter_config\.json"):
        train(out, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NotFound, match=r"holds no adapter_model\.safetensors"):
        train(out, tmp_path)
    assert not out.exists()


@pytest.mark.model
def test_an_adapter_that_changed_meanwhile_is_not_used(
    earlier: TrainedFiles, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(earlier.adapter, copy)
    found = read_adapter(copy)
    storage = StorageWithInputs(tmp_path / "storage", [], found)
    assert storage.fetch(found.ref, tmp_path / "unused") == copy
    with (copy / "adapter_model.safetensors").open("ab") as out:
        out.write(b"x")
    with pytest.raises(InvalidData, match="changed while"):
        storage.fetch(found.ref, tmp_path / "unused")
