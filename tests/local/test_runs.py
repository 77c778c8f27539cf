"""Runs of one process beside each other, and runs that are not waited for."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Settings, parse_training_config
from llamahome.errors import InvalidData
from llamahome.local import TrainedFiles, Watch, base_of_folder, train_files
from llamahome.schemas import NewEvent, Stage
from llamahome.training.supervisor import WarmEngine
from support.processes import engine_processes

QUICK: dict[str, Any] = {
    "epochs": 2, "warmup_steps": 0, "learning_rate": 1e-3, "fp16": False, "batch_size": 4,
    "gradient_accumulation_steps": 1, "lora": {"r": 2, "alpha": 4},
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "It is"}]
    lines = [
        json.dumps({"messages": [messages[0] | {"content": f"Say {n}"}, messages[1]]})
        for n in range(20)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.model
def test_a_run_that_ends_leaves_the_others_of_its_process_alone(rows: Path, tmp_path: Path) -> None:
    from llamahome.training import make_tiny

    make_tiny(tmp_path / "base", steps=0)
    others = {engine.pid for engine in engine_processes()}
    stepping, ended = threading.Event(), threading.Event()
    warned: list[str] = []

    def event(stage: Stage, said: NewEvent) -> None:
        if said.level == "warn":
            warned.append(said.message)

    def hold(stage: Stage, done: int, total: int | None, data: Mapping[str, Any]) -> None:
        if stage is Stage.training:
            stepping.set()
            assert ended.wait(120)

    def train(out: Path, watch: Watch) -> TrainedFiles:
        return train_files(
            [rows], base_of_folder(tmp_path / "base"), out,
            config=parse_training_config(QUICK, source="test"),
            settings=Settings(device="cpu", threads=1, state=tmp_path / "state"), watch=watch,
        )  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        longer = pool.submit(train, tmp_path / "longer", Watch(event=event, progress=hold))
        try:
            assert stepping.wait(120)
            train(tmp_path / "shorter", Watch())
        finally:
            ended.set()
        assert longer.result().report.training.resumed_from == ()
    assert warned == []
    assert {engine.pid for engine in engine_processes()} <= others


def test_a_second_ctrl_c_while_the_engine_ends_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("no row\n")

    def interrupted(engine: WarmEngine) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WarmEngine, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        train_files(
            [tmp_path / "rows.jsonl"], base_of_folder(tmp_path / "base"), tmp_path / "out",
            config=parse_training_config(QUICK, source="test"),
        )  # fmt: skip
    assert isinstance(caught.value.__context__, InvalidData)
    assert not (tmp_path / "out").exists()
