"""What a result came from, as digests. No torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from llamahome.config import TrainingConfig
from llamahome.schemas import JobSpec, JsonObject


def config_digest(config: TrainingConfig) -> str:
    """sha256 over the settings that decide the result, not those about how the work is done."""
    return json_digest(
        config.model_dump(
            mode="json",
            exclude={"max_workers": True, "checkpointing": {"resume"}, "lora": {"merge"}},
        )
    )


def json_digest(body: JsonObject) -> str:
    """sha256 over the JSON text with its keys sorted."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def data_digest(spec: JobSpec) -> str:
    """sha256 over the digests of the uploaded files, training files first, each in its order."""
    state = hashlib.sha256()
    for side, files in (("training", spec.training_files), ("validation", spec.validation_files)):
        for file in files:
            state.update(f"{side} {file.sha256}\n".encode())
    return state.hexdigest()


def code_digest() -> str:
    """sha256 over this room's own sources."""
    state = hashlib.sha256()
    room = Path(__file__).parent
    for path in sorted(room.rglob("*.py")):
        content = path.read_bytes()
        state.update(f"{path.relative_to(room)} {len(content)}\n".encode())
        state.update(content)
    return state.hexdigest()
