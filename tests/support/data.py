"""Rows, uploaded files and job specs for the tests of the data stages."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llamahome.config import parse_training_config
from llamahome.local import LocalPorts
from llamahome.schemas import BaseRef, FileRef, JobSpec, RunOutput, Stage, StageTask, Step
from llamahome.storage import Storage


def row(number: int, answer: str | None = None) -> bytes:
    """A valid row; rows of equal number are equal."""
    messages = [
        {"role": "user", "content": f"What is {number} and {number}?"},
        {"role": "assistant", "content": answer or f"It is {2 * number}."},
    ]
    return json.dumps({"messages": messages}).encode()


def upload(storage: Storage, content: bytes, name: str = "rows.jsonl") -> FileRef:
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"uploads/t/{sha256}"
    storage.put(path, io.BytesIO(content))
    return FileRef(id=f"file-{sha256[:8]}", filename=name, path=path, sha256=sha256,
                   bytes=len(content))  # fmt: skip


def upload_rows(storage: Storage, rows: Iterable[bytes], name: str = "rows.jsonl") -> FileRef:
    return upload(storage, b"".join(line + b"\n" for line in rows), name)


def job_spec(
    training: Iterable[FileRef],
    held: Iterable[FileRef] = (),
    *,
    base: Path | None = None,
    shard_bytes: int = 1024 * 1024,
    min_examples: int = 1,
    **config: Any,
) -> JobSpec:
    settings: Mapping[str, Any] = parse_training_config(config, source="test").model_dump(
        mode="json"
    )
    return JobSpec(
        tenant="t",
        base=BaseRef(name="tiny", path=str(base or "/nowhere"), digest="0" * 64),
        training_files=tuple(training),
        validation_files=tuple(held),
        config=dict(settings),
        shard_bytes=shard_bytes,
        min_examples=min_examples,
    )


def task_of(
    spec: JobSpec,
    stage: Stage,
    step: Step,
    plan: Mapping[str, Any] | None = None,
    inputs: Iterable[RunOutput] = (),
) -> StageTask:
    return StageTask(
        job_id="j", run_id="r", fence=1, stage=stage, step=step, shard=0, spec=spec,
        plan=dict(plan or {}), inputs=tuple(inputs),
    )  # fmt: skip


def read_artifact(storage: Storage, output: RunOutput, name: str, into: Path) -> bytes:
    assert output.artifact is not None
    return (storage.fetch(output.artifact, into) / name).read_bytes()


def ports_at(
    storage: Storage, scratch: Path, *, prefix: str = "artifacts/test", **callbacks: Any
) -> LocalPorts:
    return LocalPorts(storage, scratch, prefix, **callbacks)
