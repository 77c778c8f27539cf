"""SPEC.md's usage snippets as they are written, and what they leave in SPEC.md's tree."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamahome.config import TrainingConfig, load_settings
from llamahome.errors import InvalidState
from llamahome.local import TrainingData, base_of_folder, run_job
from llamahome.local.attempts import data_stages
from llamahome.schemas import JobSpec, Stage, Step
from llamahome.storage import LocalStorage
from support.data import upload
from support.processes import engine_processes

from .conftest import QUICK, MakeData, contents, fill

# One process trains them all: the snippet's result is looked at from many sides.
pytestmark = [pytest.mark.model, pytest.mark.xdist_group("spec-training")]

BASIC = """
# Initialize manager
manager = TrainingData(
    data_dir=Path("data"),
    batch_size=4,
    max_workers=4
)

# Process samples
await manager.process_samples(
    model_name="llama",
    model_version="3.3-7b"
)

# Train model
await manager.train_model(
    model_name="llama",
    model_version="3.3-7b"
)
"""
CUSTOM = """
config = {
    "batch_size": 2,
    "max_length": 1024,
    "lora": {
        "r": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]
    }
}

manager = TrainingData(
    data_dir=Path("data"),
    config=config
)
"""
LABEL = "llama_3.3-7b"
WEIGHTS = "adapter_model.safetensors"


def run_snippet(code: str) -> TrainingData:
    """Run it as the body of a coroutine; its ``manager``."""
    names: dict[str, Any] = {"TrainingData": TrainingData, "Path": Path}
    exec(f"async def snippet():\n{textwrap.indent(code, '    ')}    return manager\n", names)
    manager: TrainingData = asyncio.run(names["snippet"]())
    return manager


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The data folder after the basic snippet, run beside it."""
    root = tmp_path_factory.mktemp("basic") / "data"
    fill(root, tiny_folder)
    others = engine_pids()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root.parent)
        patch.setenv("LLAMAHOME_THREADS", "1")
        patch.delenv("LLAMAHOME_TRAINING_CONFIG", raising=False)
        run_snippet(BASIC)
    assert engine_pids() <= others, "an engine is left"
    return root


def engine_pids() -> set[int]:
    """Of this process; tests before these may have left the queue workers' one warm."""
    return {engine.pid for engine in engine_processes()}


@pytest.fixture
def finetuned(basic: Path) -> Path:
    return basic / "models" / "finetuned" / f"{LABEL}_finetuned"


def test_the_basic_snippet_leaves_spec_s_tree(basic: Path, finetuned: Path) -> None:
    """BEHAVIOUR 7, 78: it runs as written; every folder of the tree is there with its content, and
    no process is left."""
    for folder in ("training/samples", "training/processed", "training/checkpoints", "metrics"):
        assert any(path.is_file() for path in (basic / folder).rglob("*")), folder
    assert {path.name for path in finetuned.iterdir()} >= {
        WEIGHTS, "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "training_config.yaml", "training_metrics.json", "report.json",
    }  # fmt: skip
    assert {path.name for path in (basic / "metrics").iterdir()} == {
        f"{LABEL}.json", f"{LABEL}.history.jsonl",
    }  # fmt: skip
    assert list((basic / "training" / "checkpoints" / LABEL).rglob("checkpoint-*"))


def test_the_custom_snippet_changes_what_it_names(make_data: MakeData) -> None:
    """BEHAVIOUR 8: batch 2, length 1024, r 16, four modules; all else as it was."""
    os.chdir(make_data().parent)
    config = run_snippet(CUSTOM).effective_config("llama", num_epochs=None)
    assert (config.batch_size, config.max_length, config.lora.r) == (2, 1024, 16)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.lora.alpha, config.lora.dropout, config.lora.bias) == (32, 0.1, "none")
    assert (config.epochs, config.max_workers, config.learning_rate) == (3, 4, 5e-5)


def test_the_effective_config_is_saved_with_the_model(finetuned: Path) -> None:
    """BEHAVIOUR 25: every key of it, as the file would have it."""
    saved = yaml.safe_load((finetuned / "training_config.yaml").read_text())
    assert saved == {"training": TrainingConfig().model_dump(mode="json")}


def test_each_epoch_is_evaluated_and_the_metrics_are_those_of_the_run(
    basic: Path, finetuned: Path
) -> None:
    """BEHAVIOUR 70, 75: one evaluation before and one after each epoch, a checkpoint with each;
    five keys, numbers, equal to the history's last."""
    lines = (basic / "metrics" / f"{LABEL}.history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    evaluated = [line["step"] for line in history if "eval_loss" in line]
    assert evaluated == [0, 2, 4, 6]  # 18 rows by 4: 5 batches, 2 steps an epoch
    report = json.loads((finetuned / "report.json").read_text())["training"]
    assert report["best_step"] in evaluated
    metrics = json.loads((basic / "metrics" / f"{LABEL}.json").read_text())
    assert metrics == json.loads((finetuned / "training_metrics.json").read_text())
    assert sorted(metrics) == ["epoch", "eval_loss", "learning_rate", "step", "train_loss"]
    last = [line for line in history if "train_loss" in line][-1]
    assert metrics == {
        **{key: last[key] for key in ("train_loss", "learning_rate", "epoch", "step")},
        "eval_loss": [line for line in history if "eval_loss" in line][-1]["eval_loss"],
    }  # fmt: skip
    steps = [line["step"] for line in history if "train_loss" in line]
    assert steps == list(range(1, 7))


def test_peft_and_transformers_load_the_model_without_us(basic: Path, finetuned: Path) -> None:
    """BEHAVIOUR 74: the folder is a PEFT adapter with its tokenizer, and changes the logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(basic / "models" / "llama" / "3.3-7b")
    ids = AutoTokenizer.from_pretrained(finetuned)("What is 3 and 3?", return_tensors="pt")
    with torch.no_grad():
        before = base(ids["input_ids"]).logits
        after = PeftModel.from_pretrained(base, finetuned)(ids["input_ids"]).logits
    assert not torch.equal(before, after)


def test_the_facade_and_the_fleet_s_stages_give_the_same_adapter(
    basic: Path, finetuned: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 80: the same samples, base and settings through the stage functions of the queue
    workers, with uploaded files and published artifacts: the same bytes."""
    from llamahome.training import key, make_stage
    from llamahome.training.supervisor import WarmEngine

    storage = LocalStorage(tmp_path / "storage")
    samples = (basic / "training" / "samples" / "a.jsonl").read_bytes()
    spec = JobSpec(
        tenant="t", base=base_of_folder(basic / "models" / "llama" / "3.3-7b"),
        training_files=(upload(storage, samples, "a.jsonl"),),
        config=TrainingConfig().model_dump(mode="json"), shard_bytes=700,
    )  # fmt: skip
    engine = WarmEngine()
    settings = load_settings(scratch=tmp_path / "scratch")
    stages = {**data_stages(), Stage.training: (make_stage(settings, engine), key)}
    try:
        outputs = run_job(spec, storage, tmp_path / "scratch", stages=stages)
    finally:
        engine.shutdown()
    made = outputs[Stage.training, Step.train, 0].artifact
    assert made is not None
    place = storage.root / made.path
    for name in (WEIGHTS, "history.jsonl", "training_metrics.json", "training_config.yaml"):
        assert (place / name).read_bytes() == (finetuned / name).read_bytes(), name


def test_asked_again_it_is_done_and_other_settings_need_another_set(
    basic: Path, finetuned: Path
) -> None:
    """BEHAVIOUR 74, 9: a second call with nothing changed leaves the model as it is; settings that
    the prepared set was not made with are refused with the remedy."""
    before = (finetuned / WEIGHTS).stat().st_ino, contents(finetuned)
    done = asyncio.run(TrainingData(basic).train_model())
    assert (done.adapter, done.trained) == (finetuned, False)
    assert ((finetuned / WEIGHTS).stat().st_ino, contents(finetuned)) == before
    with pytest.raises(
        InvalidState, match=r"max_length \(512, now 64\).*process_samples"
    ) as caught:
        asyncio.run(TrainingData(basic, config={"max_length": 64}).train_model())
    assert caught.value.code == "processed_mismatch"


def test_a_run_with_other_settings_starts_afresh_says_so_and_replaces_the_model_whole(
    basic: Path, finetuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BEHAVIOUR 73, 74: checkpoints of another config are told of and not used; no file of the old
    model is left in the new one."""
    import shutil

    root = tmp_path / "data"
    shutil.copytree(basic, root, symlinks=True)
    place = root / finetuned.relative_to(basic)
    (place / "old").write_text("")
    with caplog.at_level(logging.WARNING, logger="llamahome.local"):
        done = asyncio.run(TrainingData(root).train_model(num_epochs=1))
    assert done.trained
    assert done.report.training.epochs == 1
    assert done.report.training.resumed_from == ()
    assert any("epochs (3, now 1)" in record.getMessage() for record in caplog.records)
    assert not (place / "old").exists()
    assert (place / WEIGHTS).read_bytes() != (finetuned / WEIGHTS).read_bytes()
    assert json.loads((root / "metrics" / f"{LABEL}.json").read_text())["step"] == 2


def test_a_death_while_the_model_changes_places_with_the_old_one_leaves_the_new_one(
    basic: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 74: what the exchange took out is never published again."""
    import shutil

    from llamahome.local import fitting

    root = tmp_path / "data"
    shutil.copytree(basic, root, symlinks=True)
    place = root / finetuned.relative_to(basic)

    def die_after_the_exchange(new: Path, old: Path) -> None:
        aside = tmp_path / "aside"
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
        raise OSError("died")

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "replace_folder", die_after_the_exchange)
        with pytest.raises(OSError, match="died"):
            asyncio.run(TrainingData(root).train_model(num_epochs=1))
    wanted = (place / WEIGHTS).read_bytes()
    assert wanted != (finetuned / WEIGHTS).read_bytes()

    asyncio.run(TrainingData(root).train_model(num_epochs=1))
    assert (place / WEIGHTS).read_bytes() == wanted


class FirstStep(logging.Handler):
    """Sets an event of the loop at the first step that is told of."""

    def __init__(self, event: asyncio.Event) -> None:
        super().__init__()
        self._event, self._loop = event, asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        if "Step 1/" in record.getMessage():
            self._loop.call_soon_threadsafe(self._event.set)


@pytest.mark.asyncio
async def test_a_training_can_be_cancelled_and_goes_on_where_it_was(
    make_data: MakeData, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BEHAVIOUR 63, 73, 12: the loop goes on meanwhile; another manager is told that the model is
    being trained; a cancel saves and ends the engine's process; the next call goes on there."""
    root = make_data("flat", rows=40, base=tiny_folder)
    wishes = {**QUICK, "epochs": 6, "batch_size": 1, "early_stopping": {"enabled": False}}
    manager = TrainingData(root, config=wishes)
    await manager.process_samples()
    stepping = asyncio.Event()
    logger = logging.getLogger("llamahome.local")
    handler = FirstStep(stepping)
    caplog.set_level(logging.INFO, logger="llamahome.local")
    logger.addHandler(handler)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    others = engine_pids()
    running = asyncio.ensure_future(manager.train_model())
    await stepping.wait()
    with pytest.raises(InvalidState) as caught:
        await TrainingData(root, config=wishes).train_model()
    assert caught.value.code == "folder_in_use"
    assert len(engine_pids() - others) == 1
    assert ticks >= 20
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    ticking.cancel()
    logger.removeHandler(handler)
    assert engine_pids() <= others
    assert not (root / "models" / "finetuned").exists()
    assert not (root / "checkpoints" / LABEL / "snapshot").exists()
    done = await manager.train_model()
    assert done.trained
    assert done.report.training.steps == 6 * 36
    [resumed] = done.report.training.resumed_from
    assert 1 <= resumed < 6 * 36
