"""A folder as SPEC.md has it, a tiny base in it, and samples that can be learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from support.bases import write_base

Row = dict[str, Any]
QUICK: dict[str, Any] = {
    "gradient_accumulation_steps": 1, "epochs": 2, "learning_rate": 1e-2, "warmup_steps": 1,
    "fp16": False, "max_length": 64, "lora": {"r": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder without anybody's settings, and one thread as bit equality wants it."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    monkeypatch.delenv("LLAMAHOME_TRAINING_CONFIG", raising=False)
    monkeypatch.setenv("LLAMAHOME_THREADS", "1")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as far as the data stages know it: a tokenizer with a template, no weights."""
    folder = write_base(tmp_path_factory.mktemp("bases") / "base", "chatml_generation")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.6 million parameters with random weights, and its tokenizer."""
    from llamahome.training import make_tiny

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_tiny(folder, steps=0)
    return folder


def conversation(number: int) -> Row:
    return {
        "conversation": [
            {"role": "user", "content": f"What is {number} and {number}?"},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
    }


def write_samples(folder: Path, rows: Iterable[Row], name: str = "a.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MakeData = Callable[..., Path]


@pytest.fixture
def make_data(tmp_path: Path, base_folder: Path) -> MakeData:
    """A data_dir (flat, or SPEC's tree where it is called data) with so many samples and the base
    as the models named."""

    def make(
        name: str = "data",
        *,
        rows: int = 20,
        models: Iterable[str] = ("llama/3.3-7b",),
        base: Path = base_folder,
    ) -> Path:
        return fill(tmp_path / name, base, rows=rows, models=models)

    return make


def fill(
    root: Path, base: Path, *, rows: int = 20, models: Iterable[str] = ("llama/3.3-7b",)
) -> Path:
    samples = root / "training" / "samples" if root.name == "data" else root / "samples"
    write_samples(samples, map(conversation, range(rows)))
    for model in models:
        place = root / "models" / model
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(base, target_is_directory=True)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its name below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
