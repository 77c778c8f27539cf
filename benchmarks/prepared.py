"""Training data and bases for the benchmarks: our own preprocessing gives the ids and labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from generated import read_rows

VOCABULARY = 8192
HELD_OUT = 8  # rows that nobody trains on; everyone's adapter is measured on them
IGNORED = -100  # a label that carries no loss, in transformers' words


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama's shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


SIZES = {
    "tiny": Size(64, 176, 2, 4),
    "small": Size(256, 704, 4, 4),
    "medium": Size(384, 1056, 6, 6),
    "large": Size(512, 1408, 8, 8),
}


def make_base(folder: Path, size: Size) -> None:
    """Random weights, saved into ``folder/base`` beside the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.heads, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")


def tokenise(folder: Path, max_length: int) -> Any:
    """``folder``'s conversations through the preprocessing stage's shard function: its TokenRows.

    What has no label after the cut at ``max_length`` is dropped there.
    """
    from llamahome.config import parse_training_config
    from llamahome.conversations.tokens import read_token_rows
    from llamahome.local import LocalPorts
    from llamahome.preprocessing.shard import write_shard
    from llamahome.schemas import RunOutput, Stage, StageTask, Step
    from llamahome.storage import LocalStorage

    work = folder / f"preprocessing-{max_length}"
    (work / "rows").mkdir(parents=True)
    with (work / "rows" / "rows.jsonl").open("w", encoding="utf-8") as out:
        count = 0
        for row in read_rows(folder, 0, 1):
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
    settings = parse_training_config({"max_length": max_length}, source="benchmark")
    ports = LocalPorts(LocalStorage(work / "storage"), work / "scratch", "artifacts/bench")
    validated = RunOutput(
        stage=Stage.validation, step=Step.shard, shard=0,
        artifact=ports.publish(work / "rows", "rows"),
        summary={"rows": count, "file": "rows.jsonl", "split": "training", "index": 0},
    )  # fmt: skip
    task = StageTask(
        job_id="bench", run_id="bench", fence=1, stage=Stage.preprocessing, step=Step.shard,
        shard=0, spec=job_spec(folder / "base", settings.model_dump(mode="json"), "none"),
        inputs=(validated,), plan={"split": "training", "rows": 0, "index": 0, "first_line": 0},
    )  # fmt: skip
    write_shard(task, ports, work / "tokens")
    return read_token_rows(work / "tokens" / "tokens.safetensors")


def job_spec(base: Path, config: dict[str, Any], digest: str) -> Any:
    """A spec of ``config`` on the base in a folder."""
    from llamahome.schemas import BaseRef, FileRef, JobSpec

    file = FileRef(
        id="file-bench", filename="rows.jsonl", path="none", sha256=hashlib.sha256().hexdigest(),
        bytes=1,
    )  # fmt: skip
    return JobSpec(
        tenant="bench", base=BaseRef(name="bench", path=str(base), digest=digest),
        training_files=(file,), validation_files=(), config=config, shard_bytes=1 << 30,
        min_examples=1,
    )  # fmt: skip


def settings(batch: int, seed: int = 42) -> dict[str, Any]:
    """What every contender trains with."""
    return {
        "batch_size": batch, "gradient_accumulation_steps": 1, "epochs": 1, "learning_rate": 1e-3,
        "warmup_steps": 0, "weight_decay": 0.0, "fp16": False, "seed": seed,
        "lora": {"r": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"},
        "early_stopping": {"enabled": False},
    }  # fmt: skip


def write_job(folder: Path, tokens: Any, samples: Sequence[int], batch: int, seed: int) -> None:
    """One job: token rows as our training reads them, and ``rows.json``, ids and labels as peers
    do, in the order in which ours draws them."""
    from llamahome.config import parse_training_config
    from llamahome.conversations.tokens import write_token_rows
    from llamahome.training.data import TRAINING_FILE, VALIDATION_FILE
    from llamahome.training.schedule import Plan

    folder.mkdir(parents=True)
    write_token_rows(folder / TRAINING_FILE, [tokens.token_row(int(one)) for one in samples])
    write_token_rows(folder / VALIDATION_FILE, [])
    chosen = settings(batch, seed)
    (folder / "settings.json").write_text(json.dumps(chosen))
    plan = Plan.of(parse_training_config(chosen, source="benchmark"), len(samples))
    order = [
        samples[int(place)]
        for step in range(plan.total_steps) for window in plan.micro_batches(step)
        for place in window
    ]  # fmt: skip
    write_rows(folder / "rows.json", tokens, order)


def write_rows(path: Path, tokens: Any, samples: Sequence[int]) -> None:
    rows = []
    for sample in samples:
        ids, trained = tokens.row(int(sample))
        labels = np.where(trained, ids, IGNORED)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    path.write_text(json.dumps(rows))
