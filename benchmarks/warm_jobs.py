"""Random bases made in memory, and jobs on a warm engine. Nothing here is CUDA's own."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamahome.config import parse_training_config
from llamahome.conversations.tokens import TokenRow, write_token_rows
from llamahome.schemas import BaseRef, FileRef, JobSpec, StopReason
from llamahome.training.data import TRAINING_FILE, VALIDATION_FILE, TokenData
from llamahome.training.engine.ticks import Engine
from llamahome.training.model import LoadedBase, checksum
from llamahome.training.runtime import Machine

_DIGEST = "0" * 64
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's widths. ``groups`` are its key-value heads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool = False
    context: int = 4096


SHAPES = {
    "small": Shape(128, 256, 2, 4, 2, 512),
    "tiny": Shape(64, 176, 2, 4, 2, 512),
    "1B": Shape(2048, 8192, 16, 32, 8, 128_256, tied=True),
    "8B": Shape(4096, 14_336, 32, 32, 8, 128_256),
}


def make_loaded(name: str, machine: Machine) -> tuple[LoadedBase, float]:
    """A base of random weights, made on the device; and the seconds that its checksum took."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        max_position_embeddings=shape.context, tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(machine.base_dtype)
    try:
        with torch.device(machine.device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    model.eval()
    begin = time.perf_counter()
    digest = checksum(model)
    seconds = time.perf_counter() - begin
    ref = BaseRef(name=f"random/{name}", path="none", digest=_DIGEST)
    return LoadedBase(ref, machine.device, machine.base_dtype, model, digest), seconds


def machine(device: str, precision: Any, *, exact: bool = False, tick_tokens: int = 0) -> Machine:
    """One thread on a CPU; ``exact`` as the setting ``mode: exact``."""
    where = torch.device(device)
    return Machine(where, precision, 1, exact or device == "cpu", tick_tokens=tick_tokens)


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Watched:
    """Ports that know how far a job is; set ``stop`` to cancel it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True)
        self.done = 0
        self.losses: dict[int, float | None] = {}
        self.stop: StopReason | None = None
        self.outcome: Any = None

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        self.done = done
        if data and "train_loss" in data:
            self.losses[done] = data["train_loss"]

    def event(self, *_: Any, **__: Any) -> None: ...

    def checkpoint(self, point: Any) -> None: ...

    def should_stop(self) -> StopReason | None:
        return self.stop


@dataclasses.dataclass
class Bench:
    """Engines over one base; files go below ``folder``."""

    loaded: LoadedBase
    machine: Machine
    folder: Path

    def engine(self, tier: str = "auto") -> Engine:
        engine = Engine(self.loaded, self.machine)
        board: Any = engine.warm.board
        board.tier = tier
        return engine

    def data(self, rows: int, length: int, seed: int = 0, shortest: int | None = None) -> TokenData:
        """Rows of ``length`` tokens, or from ``shortest`` up to it; the second half is trained."""
        folder = self.folder / f"data-{next(_NUMBERS)}"
        folder.mkdir(parents=True)
        draw = np.random.default_rng(seed)
        made = []
        for line in range(rows):
            size = int(draw.integers(shortest or length, length + 1))
            # Runs of consecutive ids can be learned; drawn ones could not.
            ids = (int(draw.integers(0, 400)) + np.arange(size)) % self.loaded.vocabulary
            made.append(TokenRow(ids.astype(np.int32), np.arange(size) >= size // 2, 0, line + 1))
        write_token_rows(folder / TRAINING_FILE, made)
        write_token_rows(folder / VALIDATION_FILE, [])
        return TokenData.open(folder)

    def admit(self, engine: Engine, data: TokenData, **changes: Any) -> Watched:
        ports = Watched(self.folder / f"job-{next(_NUMBERS)}")
        values = _settings(self.machine, changes)
        config = parse_training_config(values, source="benchmark")
        file = FileRef(id="file-b", filename="b", path="none", sha256=_DIGEST, bytes=1)
        spec = JobSpec(
            tenant="bench", base=self.loaded.ref, training_files=(file,), validation_files=(),
            config=config.model_dump(mode="json"), shard_bytes=1 << 30, min_examples=1,
        )  # fmt: skip

        def end(outcome: Any) -> None:
            ports.outcome = outcome

        world: Any = ports
        engine.admit(spec, config, data, world, self.machine, end)
        return ports

    def run(self, jobs: Sequence[tuple[TokenData, dict[str, Any]]]) -> list[Watched]:
        """All jobs on a fresh engine, to their ends."""
        return self.run_disturbed(jobs, lambda engine: None)

    def run_disturbed(
        self, jobs: Sequence[tuple[TokenData, dict[str, Any]]], disturb: Callable[[Engine], None]
    ) -> list[Watched]:
        """As :meth:`run`; ``disturb`` is called after four ticks."""
        engine = self.engine()
        try:
            admitted = [self.admit(engine, data, **settings) for data, settings in jobs]
            for _ in range(4):
                if engine.busy:  # an idle engine would wait for ever
                    engine.tick(wait=True)
            disturb(engine)
            engine.run()
        finally:
            engine.close()
        return admitted


def _settings(machine: Machine, changes: Mapping[str, Any]) -> dict[str, Any]:
    lora = {"r": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"}
    values: dict[str, Any] = {
        "batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 1, "learning_rate": 1e-3,
        "warmup_steps": 0, "fp16": machine.precision == "bf16",
        "mode": "exact" if machine.deterministic else "fast",
        "early_stopping": {"enabled": False},
    }  # fmt: skip
    return values | changes | {"lora": lora | changes.get("lora", {})}


def cancel(engine: Engine, jobs: Sequence[Watched]) -> None:
    """End jobs without their adapters."""
    for job in jobs:
        job.stop = StopReason.cancel
    engine.run()


def weights(job: Watched) -> torch.Tensor:
    """All of an adapter's numbers, float64 [parameters]. Raises what ended the job without one."""
    from safetensors.torch import load_file

    if isinstance(job.outcome, Exception):
        raise job.outcome
    tensors = load_file(job.outcome.folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def distance(one: Watched, other: Watched) -> float:
    """Of two adapters, relative to the first."""
    a, b = weights(one), weights(other)
    return float((a - b).norm() / a.norm())


def file_bytes(job: Watched) -> bytes:
    if isinstance(job.outcome, Exception):
        raise job.outcome
    content: bytes = (job.outcome.folder / "adapter_model.safetensors").read_bytes()
    return content
