"""What fails, fails by its name, keeps the last good checkpoint, and gives everything back."""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from llamahome.errors import LlamaHomeError, NotFound, TrainingFailed, Unavailable
from llamahome.local import TrainingData
from llamahome.schemas import JsonObject, Manifest, ManifestEntry
from llamahome.storage import local as storage
from support.processes import engine_processes

from .conftest import QUICK, MakeData, fill

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("spec-failures")]

LABEL = "llama_3.3-7b"
WEIGHTS = Path("models", "finetuned", f"{LABEL}_finetuned", "adapter_model.safetensors")
WISHES: dict[str, Any] = {
    **QUICK, "epochs": 4, "batch_size": 1, "early_stopping": {"enabled": False},
    "checkpointing": {"save_total_limit": 9},
}  # fmt: skip
_TRAIN = """
import asyncio, json, sys
from llamahome.local import TrainingData
asyncio.run(TrainingData(sys.argv[1], config=json.loads(sys.argv[2])).train_model())
"""


def train(root: Path, **changes: Any) -> Any:
    return asyncio.run(TrainingData(root, config={**WISHES, **changes}).train_model())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoints(root: Path) -> dict[str, str]:
    """The digest of each complete one's weights, by its name."""
    found = (root / "checkpoints" / LABEL).glob("checkpoints/jobs/*/runs/*/f*/checkpoint-*")
    return {
        path.name: digest(path / "adapter.safetensors")
        for path in sorted(found, key=lambda path: path.name)
        if (path / "MANIFEST.json").is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> str:
    """The digest of the weights of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed") / "flat"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root.parent)
        patch.setenv("LLAMAHOME_THREADS", "1")
        patch.delenv("LLAMAHOME_TRAINING_CONFIG", raising=False)
        train(prepared(root, tiny_folder))
    return digest(root / WEIGHTS)


def prepared(root: Path, base: Path) -> Path:
    fill(root, base, rows=10)
    asyncio.run(TrainingData(root, config=WISHES).process_samples())
    return root


@pytest.fixture
def stopped(tmp_path: Path, tiny_folder: Path) -> Path:
    """A data folder whose training was ended by SIGTERM after it had saved something."""
    root = prepared(tmp_path / "flat", tiny_folder)
    words = [sys.executable, "-c", _TRAIN, str(root), json.dumps(WISHES)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not checkpoints(root):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    _, alive = psutil.wait_procs(below, timeout=10)
    assert below
    assert not alive, "the engine outlived the process that it worked for"
    return root


Fail = Callable[[pytest.MonkeyPatch], None]


def fill_the_disk(patch: pytest.MonkeyPatch) -> None:
    """For the next checkpoint that is published."""
    real = storage._seal

    def seal(
        folder: Path, kind: str, entries: Sequence[ManifestEntry], facts: JsonObject | None
    ) -> Manifest:
        if kind == "checkpoint":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, kind, entries, facts)

    patch.setattr(storage, "_seal", seal)


def take_the_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("LLAMAHOME_MEMORY_BYTES", "1")


@pytest.mark.parametrize(
    ("fail", "kind", "code"),
    [
        (fill_the_disk, Unavailable, "storage_full"),
        (take_the_memory, TrainingFailed, "out_of_memory"),
    ],
)
def test_a_training_that_fails_says_how_and_goes_on_from_its_last_checkpoint(
    stopped: Path, undisturbed: str, fail: Fail, kind: type[LlamaHomeError], code: str
) -> None:
    """BEHAVIOUR 76: killed by SIGTERM, then out of disk or memory: the error's type and code say
    it, no model and no metrics are there, every checkpoint is what it was; once there is room
    again, the rest is trained from there and has the bytes of an undisturbed run."""
    before = checkpoints(stopped)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises(kind) as caught:
            train(stopped)
    assert caught.value.code == code
    assert caught.value.remedy
    assert checkpoints(stopped) == before
    assert not (stopped / "models" / "finetuned").exists()
    assert not (stopped / "metrics").exists()
    assert sorted(path.name for path in (stopped / "checkpoints" / LABEL).iterdir()) == [
        ".lock", "checkpoints",
    ]  # fmt: skip

    done = train(stopped)

    [resumed] = done.report.training.resumed_from
    assert resumed == int(max(before).rpartition("-")[2])
    assert digest(stopped / WEIGHTS) == undisturbed


def test_a_loss_that_explodes_fails_the_training_and_leaves_the_earlier_model(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """BEHAVIOUR 76: ``nan_loss``, with what to do; the model and the metrics of the run before
    stay, and the finished mark is not given to the one that failed."""
    root = prepared(tmp_path / "flat", tiny_folder)
    train(root, epochs=1)
    before = digest(root / WEIGHTS), (root / "metrics" / f"{LABEL}.json").read_bytes()
    with pytest.raises(TrainingFailed) as caught:
        train(root, learning_rate=1e30)
    assert (caught.value.code, bool(caught.value.remedy)) == ("nan_loss", True)
    assert (digest(root / WEIGHTS), (root / "metrics" / f"{LABEL}.json").read_bytes()) == before
    assert train(root, epochs=1).trained


def held(process: psutil.Process) -> set[tuple[str, object]]:
    """Open files, threads and engines of this process."""
    gc.collect()  # a caught error's frames are a cycle, and hold on to what they worked with
    return {
        *(("file", number) for number in range(process.num_fds())),
        *(("thread", thread) for thread in threading.enumerate()),
        *(("engine", engine.pid) for engine in engine_processes()),
    }


def test_a_training_gives_back_all_that_it_took(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 65: whether it ends well, fails or is cancelled: no open file, no thread, no
    process (and with it none of its memory, the GPU's too), no temporary file stays."""
    root = prepared(tmp_path / "flat", tiny_folder)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    here = psutil.Process()
    before = held(here)

    async def cancel() -> None:
        running = asyncio.ensure_future(TrainingData(root, config=WISHES).train_model())
        while not checkpoints(root):
            assert not running.done()
            await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    def end_well() -> None:
        assert train(root, epochs=1).trained

    def fail() -> None:
        with pytest.raises(TrainingFailed):
            train(root, learning_rate=1e30)

    def be_cancelled() -> None:
        shutil.rmtree(root / "checkpoints")
        asyncio.run(cancel())

    def find_no_model() -> None:
        with pytest.raises(NotFound):
            asyncio.run(TrainingData(root).process_samples("llama", "none"))

    for run in (end_well, fail, be_cancelled, find_no_model):
        run()
        until = time.monotonic() + 10
        while held(here) - before and time.monotonic() < until:
            time.sleep(0.05)  # a thread that was told to end takes a moment
        assert held(here) - before == set(), run.__name__
        assert list(temporary.iterdir()) == [], run.__name__
        assert not [path for path in root.rglob("*") if "scratch" in path.name], run.__name__
        assert not [path for path in root.rglob(".*") if path.name != ".lock"], run.__name__


@pytest.mark.parametrize(("fp16", "told"), [(True, 1), (False, 0)])
def test_fp16_on_a_cpu_is_told_of_once_and_changes_no_byte(
    make_data: MakeData, tiny_folder: Path, caplog: pytest.LogCaptureFixture, undisturbed: str,
    fp16: bool, told: int,
) -> None:  # fmt: skip
    """BEHAVIOUR 69: a warning that names the fp32 used instead, once; the report says fp32, the
    weights are fp32, the saved settings are those asked for; nothing is scaled or unscaled."""
    from safetensors import safe_open

    root = make_data("flat", rows=10, base=tiny_folder)
    manager = TrainingData(root, config={**WISHES, "fp16": fp16})
    with caplog.at_level(logging.WARNING, logger="llamahome.local"):
        asyncio.run(manager.process_samples())
        done = asyncio.run(manager.train_model())
    said = [r.getMessage() for r in caplog.records if "fp16" in r.getMessage()]
    assert len(said) == told
    assert all("not available on a CPU: training in fp32" in message for message in said)
    assert done.report.training.precision == "fp32"
    history = (root / "metrics" / f"{LABEL}.history.jsonl").read_text().splitlines()
    assert all(line.get("train_loss", 0) is not None for line in map(json.loads, history))
    saved = yaml.safe_load((done.adapter / "training_config.yaml").read_text())
    assert saved["training"]["fp16"] is fp16
    with safe_open(root / WEIGHTS, framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}
    assert digest(root / WEIGHTS) == undisturbed


@pytest.mark.parametrize(
    ("cuda", "has_bf16", "fp16", "expected"),
    [
        (True, True, True, ("cuda", "bf16", "info", "bf16 is used in place of fp16")),
        (True, False, True, ("cuda", "fp32", "warn", "This GPU has no bf16: training in fp32")),
        (True, True, False, ("cuda", "fp32", None, "")),
        (False, False, True, ("cpu", "fp32", "warn", "fp16 is not available on a CPU")),
        (False, False, False, ("cpu", "fp32", None, "")),
    ],
)
def test_the_precision_is_what_the_device_has_and_is_named(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, has_bf16: bool, fp16: bool,
    expected: tuple[str, str, str | None, str],
) -> None:  # fmt: skip
    """BEHAVIOUR 69: bf16 before fp16, which alone would need its gradients unscaled; fp32 where
    there is none, with a warning."""
    import torch

    from llamahome.config import parse_training_config
    from llamahome.training.runtime import Runtime, choose_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    machine = choose_machine(Runtime("auto", 1), parse_training_config({"fp16": fp16}, source="t"))
    device, precision, level, note = expected
    assert (machine.device.type, machine.precision) == (device, precision)
    assert (machine.note or "").startswith(note)
    assert level is None or machine.note_level == level
    assert bool(machine.note) == (level is not None)


@pytest.mark.gpu
def test_on_a_gpu_fp16_trains_in_mixed_precision_and_its_memory_comes_back(
    make_data: MakeData, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 69, 65: bf16 for the base, fp32 for the adapter; the losses are numbers and fall;
    afterwards the device has as much free as before."""
    import torch
    from safetensors import safe_open

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    root = make_data("flat", rows=10, base=tiny_folder)
    monkeypatch.setenv("LLAMAHOME_DEVICE", "cuda")
    free, _ = torch.cuda.mem_get_info()
    manager = TrainingData(root, config={**WISHES, "fp16": True})
    asyncio.run(manager.process_samples())
    training = asyncio.run(manager.train_model()).report.training
    assert training.precision == "bf16"
    assert training.eval_loss_before is not None
    assert training.eval_loss_after is not None
    assert training.eval_loss_after < training.eval_loss_before
    with safe_open(root / WEIGHTS, framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}
    assert torch.cuda.mem_get_info()[0] >= free - os.sysconf("SC_PAGESIZE")
