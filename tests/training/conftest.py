"""A base much smaller than tiny, rows that can be learned, and ports that remember."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from llamahome.conversations.tokens import TokenRow, read_token_rows, write_token_rows
from llamahome.schemas import (
    ArtifactRef,
    BaseRef,
    CheckpointRef,
    FileCounts,
    FileRef,
    JobSpec,
    PreparationReport,
    RunOutput,
    SplitCounts,
    Stage,
    StageTask,
    Step,
    StopReason,
    ValidationReport,
)
from llamahome.storage.bases import base_digest
from llamahome.training.ports import LocalCheckpoint

VOCABULARY = 64
CONTEXT = 48  # tokens; the longest row of the fixtures has 24


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 30,000 parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(base_folder: Path) -> BaseRef:
    return BaseRef(name="test/base", path=str(base_folder), digest=base_digest(base_folder))


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What preprocessing publishes: 11 training rows of several lengths, 3 validation rows."""
    folder = tmp_path_factory.mktemp("prepared")
    write_prepared(folder, training=11, validation=3)
    return folder


def write_prepared(folder: Path, *, training: int, validation: int, longest: int = 24) -> None:
    write_token_rows(folder / "training.safetensors", token_rows(training, 1, longest))
    write_token_rows(folder / "validation.safetensors", token_rows(validation, 2, longest))
    counts = [
        SplitCounts(
            rows=len(rows),
            tokens=rows.total_tokens,
            trained_tokens=rows.total_trained,
            longest=int(rows.lengths.max(initial=0)),
        )
        for rows in (
            read_token_rows(folder / "training.safetensors"),
            read_token_rows(folder / "validation.safetensors"),
        )
    ]
    report = PreparationReport(
        rows_in=training + validation, training=counts[0], validation=counts[1]
    )
    (folder / "preparation.json").write_text(report.model_dump_json())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"a": "tokenizer"}')


def token_rows(count: int, seed: int, longest: int = 24) -> list[TokenRow]:
    """Runs of consecutive ids: the first third is the prompt, the rest is trained."""
    random = np.random.default_rng(seed)
    rows = []
    for line in range(count):
        length = int(random.integers(6, longest + 1))
        start = int(random.integers(2, VOCABULARY - 2))
        ids = (start + np.arange(length)) % (VOCABULARY - 2) + 2
        trained = np.arange(length) >= length // 3
        rows.append(TokenRow(ids.astype(np.int32), trained, 0, line + 1))
    return rows


@pytest.fixture
def make_spec(base: BaseRef) -> Callable[..., JobSpec]:
    """A spec with quick settings; keywords are merged over them, ``lora`` key by key."""

    def make(**changes: Any) -> JobSpec:
        from llamahome.config import merge, parse_training_config

        quick: dict[str, Any] = {
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "epochs": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "fp16": False,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        }
        config = parse_training_config(merge(quick, changes, source="test"), source="test")
        file = FileRef(id="file-1", filename="a.jsonl", path="uploads/a", sha256="a" * 64, bytes=1)
        return JobSpec(
            tenant="t",
            base=base,
            training_files=(file,),
            config=config.model_dump(mode="json"),
            shard_bytes=1,
        )

    return make


class RecordingPorts:
    """Keeps what it is told. Serves the loop (TrainPorts) and the stage (Ports) alike.

    ``stop_at`` maps a number of optimizer steps to the reason given once that many are done.
    """

    def __init__(self, root: Path, stop_at: Mapping[int, StopReason] | None = None) -> None:
        self.scratch = root / "scratch"
        self.scratch.mkdir(parents=True)
        self.store = root / "store"
        self.stop_at = dict(stop_at or {})
        self.done = 0
        self.steps_seen: list[int] = []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.points: list[LocalCheckpoint | CheckpointRef] = []
        self.kept: dict[int, Path] = {}
        self.on_progress: Callable[[int], None] = lambda done: None

    def open(self, file: FileRef) -> BinaryIO:
        raise AssertionError("training opens no uploaded file")

    def folder(self, artifact: ArtifactRef, only: Collection[str] | None = None) -> Path:
        return Path(artifact.path)

    def publish(self, folder: Path, kind: str) -> ArtifactRef:
        target = self.store / kind / folder.name
        shutil.copytree(folder, target)
        digest = hashlib.sha256(json.dumps(tree(target)).encode()).hexdigest()
        return ArtifactRef(digest=digest, path=str(target), bytes=1)

    def checkpoint(self, point: LocalCheckpoint | CheckpointRef) -> None:
        self.points.append(point)
        if isinstance(point, LocalCheckpoint):
            kept = self.store / point.folder.name
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(point.folder, kept)
            self.kept[point.step] = kept

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        self.done = done
        if data and (not self.steps_seen or self.steps_seen[-1] != done):
            self.steps_seen.append(done)
        self.on_progress(done)

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        self.events.append((level, message, dict(data or {})))

    def should_stop(self) -> StopReason | None:
        return self.stop_at.get(self.done)

    def messages(self, level: str | None = None) -> list[str]:
        return [message for at, message, _ in self.events if level in (None, at)]


@pytest.fixture
def make_ports(tmp_path: Path) -> Callable[..., RecordingPorts]:
    """Ports of a name of their own, and where they stop the work."""

    def make(name: str, stop_at: Mapping[int, StopReason] | None = None) -> RecordingPorts:
        return RecordingPorts(tmp_path / "ports" / name, stop_at)

    return make


@pytest.fixture
def ports(make_ports: Callable[..., RecordingPorts]) -> RecordingPorts:
    return make_ports("ports")


@pytest.fixture
def make_prepared(tmp_path: Path) -> Callable[..., Path]:
    """A folder as preprocessing publishes it, with so many rows."""

    def make(*, training: int, validation: int, longest: int = 24) -> Path:
        folder = tmp_path / f"prepared-{training}-{validation}-{longest}"
        folder.mkdir()
        write_prepared(folder, training=training, validation=validation, longest=longest)
        return folder

    return make


def tree(folder: Path) -> dict[str, str]:
    """Every file's digest by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def make_task(
    make_spec: Callable[..., JobSpec], prepared_folder: Path, tmp_path: Path
) -> Callable[..., StageTask]:
    """A training task with both close outputs; keywords beside ``resume`` go to the spec."""

    def make(resume: CheckpointRef | None = None, **changes: Any) -> StageTask:
        validation = tmp_path / "validation"
        validation.mkdir(exist_ok=True)
        counts = FileCounts(file="a.jsonl", total=14, valid=14)
        report = ValidationReport(files=(counts,), total=14, valid=14, invalid={}, duplicates=0)
        (validation / "report.json").write_text(report.model_dump_json())
        digests = {"tokenizer_digest": "b" * 64, "template_digest": "c" * 64}
        outputs = tuple(
            RunOutput(
                stage=stage,
                step=Step.close,
                shard=0,
                artifact=ArtifactRef(digest="e" * 64, path=str(folder), bytes=1),
                summary=summary,
            )
            for stage, folder, summary in (
                (Stage.validation, validation, {}),
                (Stage.preprocessing, prepared_folder, digests),
            )
        )
        return StageTask(
            job_id="ftjob-1",
            run_id="run-1",
            fence=1,
            stage=Stage.training,
            step=Step.train,
            shard=0,
            spec=make_spec(**changes),
            plan={},
            inputs=outputs,
            resume=resume,
        )

    return make
