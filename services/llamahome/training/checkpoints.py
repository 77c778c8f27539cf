"""Resume points: everything that the rest of a run depends on, at an optimizer-step boundary.

A folder ``checkpoint-<step>`` with ``adapter.safetensors``, ``optimizer.safetensors`` (AdamW's
moments and step counts), ``best.safetensors`` (where the best weights are not these),
``history.jsonl`` and ``state.json``, which is written last and holds the digests of the others.
There is no generator state to save: order and dropout are functions of (seed, step, micro-batch).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llamahome.errors import CorruptArtifact, InvalidState
from llamahome.schemas import JsonObject
from llamahome.training.crashing import crash_point
from llamahome.training.steps import StepTaken
from llamahome.training.stopping import EarlyStopping
from llamahome.training.tensors import save_tensors

_FORMAT = 1
_STATE = "state.json"
_HISTORY = "history.jsonl"
_ADAPTER = "adapter.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_BEST = "best.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class TrainState:
    """Where a run stands after ``step`` optimizer steps. Losses are in nats per labelled token."""

    step: int = 0
    left_out: int = 0  # steps of the plan that were never taken, for a watcher ended their epoch
    seen_tokens: int = 0
    trained_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    train_loss: float | None = None
    learning_rate: float = 0.0
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    evaluated_at: int | None = None
    stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)
    step_ledger: str = ""
    resumed_from: list[int] = dataclasses.field(default_factory=list)
    history: list[JsonObject] = dataclasses.field(default_factory=list)
    proofs: JsonObject = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> int:
        """Steps of the plan that lie behind, whether taken or left out."""
        return self.step + self.left_out

    def copy(self) -> TrainState:
        """One that later steps do not change; history lines are never changed, only added."""
        return dataclasses.replace(
            self, stopping=dataclasses.replace(self.stopping), proofs=dict(self.proofs),
            resumed_from=list(self.resumed_from), history=list(self.history),
        )  # fmt: skip

    def take(self, step: StepTaken) -> None:
        """Count a step, and add it to the rolling sha256 over (step, sample ids, loss bits,
        grad-norm bits): two runs with equal ledgers took the same rows in the same steps.
        """
        self.step += 1
        self.learning_rate = step.learning_rate
        self.train_loss = step.loss if math.isfinite(step.loss) else None
        self.seen_tokens += step.tokens
        self.trained_tokens += step.labelled
        self.skipped_steps += not step.finite
        self.skipped_in_a_row = 0 if step.finite else self.skipped_in_a_row + 1
        entry = hashlib.sha256(bytes.fromhex(self.step_ledger))
        entry.update(struct.pack(f"<q{len(step.samples)}q", self.step, *step.samples))
        entry.update(struct.pack("<dd", step.loss, step.grad_norm))
        self.step_ledger = entry.hexdigest()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. ``identity`` has the digests of data, base and config."""

    state: TrainState
    adapter: Tensors
    optimizer: Tensors
    best: Tensors | None
    identity: JsonObject
    fingerprint: JsonObject


def save_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write ``root/checkpoint-<step>`` under another name, then rename it. Raises OSError."""
    target = root / f"checkpoint-{snapshot.state.step:08d}"
    draft = root / f".{target.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_tensors(snapshot.adapter, draft / _ADAPTER)
    save_tensors(snapshot.optimizer, draft / _OPTIMIZER)
    if snapshot.best is not None and snapshot.state.stopping.best_step != snapshot.state.step:
        save_tensors(snapshot.best, draft / _BEST)
    write_history(draft / _HISTORY, snapshot.state.history)
    crash_point("after_tmp_write")
    state = dataclasses.asdict(snapshot.state)
    del state["history"]
    body = {
        "v": _FORMAT,
        "state": state,
        "identity": snapshot.identity,
        "fingerprint": snapshot.fingerprint,
        "files": {path.name: _digest(path) for path in sorted(draft.iterdir())},
    }
    (draft / _STATE).write_text(json.dumps(body, indent=1, allow_nan=False), encoding="utf-8")
    crash_point("after_manifest")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    crash_point("after_rename")
    return target


def load_checkpoint(folder: Path) -> Snapshot:
    """Read and verify a checkpoint. Raises CorruptArtifact naming the file at fault."""
    try:
        body = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if body["v"] != _FORMAT:
            raise CorruptArtifact(f"checkpoint format {body['v']}, expected {_FORMAT}", file=_STATE)
        for name, digest in body["files"].items():
            if _digest(folder / name) != digest:
                raise CorruptArtifact("the bytes differ from their digest", file=name)
        best = load_file(folder / _BEST) if _BEST in body["files"] else None
        return Snapshot(
            state=_state(body["state"], _read_history(folder / _HISTORY)),
            adapter=load_file(folder / _ADAPTER),
            optimizer=load_file(folder / _OPTIMIZER),
            best=best,
            identity=body["identity"],
            fingerprint=body["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CorruptArtifact(f"unreadable checkpoint: {error}", file=folder.name) from error


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises InvalidState where a checkpoint belongs to another run than the one at hand."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise InvalidState(
                f"the checkpoint was made with another {name} ({found.get(name)!r}, now {value!r})",
                code="checkpoint_mismatch",
                remedy="Start afresh, or go back to what it was made with",
            )


def prune_checkpoints(root: Path, keep: int, best_step: int | None) -> None:
    """Delete the oldest above ``keep``, but never the newest nor the best."""
    folders = sorted(root.glob("checkpoint-*"))
    spared = {f"checkpoint-{best_step:08d}"} if best_step is not None else set()
    spare = len(folders) - keep
    for folder in folders[:-1]:
        if spare > 0 and folder.name not in spared:
            shutil.rmtree(folder)
            spare -= 1
            crash_point("during_gc")


def write_history(path: Path, history: Sequence[JsonObject]) -> None:
    """One JSON object a line, in step order; no clock times, so equal runs give equal bytes."""
    lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in history]
    path.write_text("".join(lines), encoding="utf-8")


def _state(values: dict[str, Any], history: list[JsonObject]) -> TrainState:
    stopping = EarlyStopping(**values.pop("stopping"))
    return TrainState(**values, stopping=stopping, history=history)


def _read_history(path: Path) -> list[JsonObject]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
