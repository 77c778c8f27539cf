"""The signatures, arguments, names and folders of SPEC.md."""

from __future__ import annotations

import inspect
import logging
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import load_registry
from llamahome.errors import InvalidConfig, InvalidState, LlamaHomeError, NotFound
from llamahome.local import TrainingData

from .conftest import MakeData, contents

SHIPPED = Path(__file__).parents[2] / "configs" / "models.yaml"


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    empty = inspect.Parameter.empty
    return [
        (p.name, None if p.default is empty else p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def test_the_manager_is_made_as_spec_writes_it(tmp_path: Path) -> None:
    """BEHAVIOUR 1: the signature; text and paths; parents are made; a file is refused."""
    assert parameters(TrainingData.__init__) == [
        ("self", None), ("data_dir", None), ("batch_size", 4), ("max_workers", 4), ("config", None),
    ]  # fmt: skip
    assert inspect.signature(TrainingData.__init__).parameters["data_dir"].default is (
        inspect.Parameter.empty
    )
    for given in (str(tmp_path / "a" / "b"), tmp_path / "c" / "d"):
        assert TrainingData(given).data_dir == Path(given)
        assert Path(given).is_dir()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", "", "a\0b", None, 5):
        with pytest.raises(InvalidConfig) as caught:
            TrainingData(wrong)  # type: ignore[arg-type]
        assert caught.value.place.field == "data_dir"


def test_the_attributes_are_readable_and_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    """BEHAVIOUR 2: attributes; the constructor loads no torch, broker or HTTP client."""
    manager = TrainingData(str(tmp_path), batch_size=2, max_workers=3, config={"epochs": 1})
    assert (manager.data_dir, manager.batch_size, manager.max_workers, manager.config) == (
        tmp_path, 2, 3, {"epochs": 1},
    )  # fmt: skip
    code = (
        "import sys; from llamahome.local import TrainingData; TrainingData(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'celery', 'redis', 'httpx2') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("field", ["batch_size", "max_workers"])
@pytest.mark.parametrize("value", [0, -1, "4", True, 2.5, None])
def test_sizes_that_are_no_counts_are_refused_by_name(
    tmp_path: Path, field: str, value: Any
) -> None:
    """BEHAVIOUR 3: a wrong batch_size or max_workers is a typed error naming the field."""
    with pytest.raises(InvalidConfig) as caught:
        TrainingData(tmp_path / "never", **{field: value})
    assert caught.value.place.field == field
    assert not (tmp_path / "never").exists()


@pytest.mark.asyncio
async def test_process_samples_takes_its_arguments_every_way(tmp_path: Path) -> None:
    """BEHAVIOUR 4: a coroutine function of (model_name="llama", model_version=None)."""
    assert inspect.iscoroutinefunction(TrainingData.process_samples)
    assert parameters(TrainingData.process_samples) == [
        ("self", None), ("model_name", "llama"), ("model_version", None),
    ]  # fmt: skip
    manager = TrainingData(tmp_path)
    assert (await manager.process_samples()).version is None
    assert (await manager.process_samples("llama", "3.3-7b")).version == "3.3-7b"
    assert (await manager.process_samples(model_version="1", model_name="other")).model == "other"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("keyword", "field"),
    [("num_epochs", "epochs"), ("learning_rate", "learning_rate"), ("lora_r", "lora.r"),
     ("lora_alpha", "lora.alpha")],
)  # fmt: skip
async def test_keywords_of_train_model_beat_the_config_and_zero_is_no_none(
    tmp_path: Path, keyword: str, field: str
) -> None:
    """BEHAVIOUR 5: the optional keywords; only None leaves the word to the config, 0 is refused."""
    assert inspect.iscoroutinefunction(TrainingData.train_model)
    assert parameters(TrainingData.train_model) == [
        ("self", None), ("model_name", "llama"), ("model_version", None), ("num_epochs", None),
        ("learning_rate", None), ("lora_r", None), ("lora_alpha", None), ("lora_dropout", None),
    ]  # fmt: skip
    manager = TrainingData(tmp_path, config={"epochs": 7, "lora": {"r": 2, "dropout": 0.5}})
    with pytest.raises(InvalidConfig) as caught:
        await manager.train_model(**{keyword: 0})
    assert caught.value.place.field == keyword
    with pytest.raises(InvalidConfig, match="'lora_r'"):
        manager.effective_config(lora_rank=3)
    config = manager.effective_config(**{keyword: 3, "lora_dropout": 0.0, "num_epochs": 3})
    values: Any = config.model_dump()
    for part in field.split("."):
        values = values[part]
    assert values == 3
    assert (config.epochs, config.lora.dropout) == (3, 0.0)
    assert manager.effective_config(lora_r=None).lora.r == 2


@pytest.mark.asyncio
async def test_process_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BEHAVIOUR 6: SPEC.md's example test as it is written, and the warning that says why."""
    manager = TrainingData(tmp_path)
    await manager.process_samples("llama", "3.3-7b")
    assert (tmp_path / "processed").exists()
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "no samples" in warning


@pytest.mark.asyncio
async def test_training_before_processing_names_what_is_missing_and_what_to_do(
    make_data: MakeData,
) -> None:
    """BEHAVIOUR 9: train_model without a prepared set is an error with the remedy."""
    root = make_data()
    with pytest.raises(InvalidState) as caught:
        await TrainingData(root).train_model("llama", "3.3-7b")
    assert caught.value.code == "not_processed"
    assert "processed/llama_3.3-7b" in str(caught.value)
    assert "process_samples('llama', '3.3-7b')" in str(caught.value)
    assert not (root / "models" / "finetuned").exists()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "a\0b", ".", "..", ".hidden", "a b", "x" * 101, 3.3, True, b"x"]
)
async def test_names_that_could_leave_the_folder_are_refused(
    make_data: MakeData, tmp_path: Path, name: Any
) -> None:
    """BEHAVIOUR 10: no name becomes a path out of data_dir, for neither call."""
    root = make_data()
    manager = TrainingData(root)
    before = sorted(tmp_path.rglob("*"))
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: manager.process_samples(name),
        lambda: manager.process_samples("llama", name),
        lambda: manager.train_model(name),
        lambda: manager.train_model("llama", name),
    ]
    for call in calls:
        with pytest.raises(InvalidConfig) as caught:
            await call()
        assert caught.value.place.field in ("model_name", "model_version")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.asyncio
async def test_an_unknown_model_or_version_says_where_it_was_looked_for(
    make_data: MakeData,
) -> None:
    """BEHAVIOUR 10: an unknown model or version is an error naming it and the remedy."""
    manager = TrainingData(make_data())
    for name, version in (("mistral", "1"), ("llama", "9")):
        with pytest.raises(NotFound) as caught:
            await manager.process_samples(name, version)
        assert caught.value.code == "model_not_found"
        assert f"models/{name}/{version}" in str(caught.value)
    with pytest.raises(NotFound, match="no default version"):
        await manager.process_samples("mistral")


@pytest.mark.asyncio
async def test_no_version_means_the_default_one_in_every_name(
    make_data: MakeData, tmp_path: Path
) -> None:
    """BEHAVIOUR 11: None is the registry's default version, and the files are that version's."""
    assert load_registry(SHIPPED).default_version("llama") == "3.3-7b"
    Path("configs").mkdir()
    Path("configs/models.yaml").write_text('models: {llama: {default_version: "3.3-7b"}}')
    root = make_data(models=("llama/3.3-7b", "llama/other"))
    processed = root / "training" / "processed"
    await TrainingData(root).process_samples("llama")
    unnamed = contents(processed)
    shutil.rmtree(processed)
    await TrainingData(root).process_samples("llama", "3.3-7b")
    assert contents(processed) == unnamed
    assert not [path for path in tmp_path.rglob("*") if "None" in path.name]
    Path("configs/models.yaml").unlink()
    with pytest.raises(NotFound, match=r"there are 3\.3-7b, other"):
        await TrainingData(root).process_samples("llama")
    (root / "models" / "llama" / "other").unlink()
    assert (await TrainingData(root).process_samples("llama")).version == "3.3-7b"


@pytest.mark.asyncio
async def test_a_model_may_lie_where_the_registry_says(
    base_folder: Path, make_data: MakeData
) -> None:
    """BEHAVIOUR 10: the registry names a folder; a version that YAML takes for a number is told."""
    Path("configs").mkdir()
    registry = Path("configs/models.yaml")
    registry.write_text(f'models: {{phi: {{versions: {{"4": {{path: "{base_folder}"}}}}}}}}')
    root = make_data(models=())
    assert (await TrainingData(root).process_samples("phi", "4")).preparation is not None
    registry.write_text("models: {phi: {default_version: 3.3}}")
    with pytest.raises(InvalidConfig, match='"3.3"') as caught:
        await TrainingData(root).process_samples("phi")
    assert caught.value.place.field == "models.phi.default_version"
    registry.write_text("models: {phi: {versions: {'4': {}}}}")
    with pytest.raises(InvalidConfig, match="path or hub"):
        await TrainingData(root).process_samples("phi", "4")


@pytest.mark.asyncio
async def test_a_repository_of_the_hub_is_taken_from_its_copy_here(
    base_folder: Path, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 10: a hub id is the copy in the hub's cache; offline without one it is an error."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub" / "models--org--tiny"
    commit = "0" * 40
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / commit).symlink_to(base_folder, target_is_directory=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    Path("configs").mkdir()
    Path("configs/models.yaml").write_text(
        "models: {tiny: {versions: {'1': {hub: org/tiny}, '2': {hub: org/none}}}}"
    )
    root = make_data(models=())
    assert (await TrainingData(root).process_samples("tiny", "1")).preparation is not None
    with pytest.raises(LlamaHomeError, match="org/none") as caught:
        await TrainingData(root).process_samples("tiny", "2")
    assert caught.value.code == "model_not_found"


@pytest.mark.asyncio
async def test_the_folders_are_those_of_spec_in_data_and_flat_elsewhere(
    make_data: MakeData, tmp_path: Path
) -> None:
    """BEHAVIOUR 78: the nested tree for a data_dir called data, or one with training in it; flat
    for any other."""
    nested, flat = make_data("data"), make_data("elsewhere")
    other = tmp_path / "corpus"
    (other / "training").mkdir(parents=True)
    for root in (nested, flat, other):
        await TrainingData(root).process_samples()
    assert (nested / "training" / "processed" / "llama_3.3-7b" / "manifest.json").is_file()
    assert (flat / "processed" / "llama_3.3-7b" / "manifest.json").is_file()
    assert (other / "training" / "samples").is_dir()
    assert not (nested / "processed").exists()
