"""Several jobs at once on one warm engine, through real processes."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamahome.client import Client
from support.fleet import Fleet

# Different in everything that may differ side by side.
JOBS: list[dict[str, Any]] = [
    {"seed": 1, "lora": {"r": 8, "alpha": 16}},
    {"seed": 2, "batch_size": 2, "lora": {"r": 16, "dropout": 0.2, "target_modules": "all-linear"}},
    {"seed": 3, "gradient_accumulation_steps": 3, "learning_rate": 2e-3, "lora": {"r": 4}},
]
COMMON: dict[str, Any] = {
    "epochs": 6, "max_length": 128, "early_stopping": {"enabled": False},
    "checkpointing": {"save_strategy": "steps", "save_steps": 4},
}  # fmt: skip


def _client(fleet: Fleet) -> Client:
    endpoint = fleet.endpoint()
    return Client(endpoint["url"], endpoint["key"])


def _submit(client: Client, data: Path, settings: dict[str, Any]) -> str:
    config = COMMON | settings
    return client.submit(data / "train.jsonl", base="tiny", recipe="quick", config=config).id


def _weights(client: Client, job: str, into: Path) -> str:
    folder = client.fetch(job, into / job)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def _training(client: Client, job: str) -> Any:
    return next(run for run in client.runs(job) if run.stage == "training")


def _engines(fleet: Fleet) -> list[psutil.Process]:
    return [each for each in fleet.children() if "llamahome.training.engine" in each.cmdline()]


@pytest.fixture(scope="module")
def alone(fleet: Fleet, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weights of each job when it has the engine to itself."""
    found = []
    with _client(fleet) as client:
        for settings in JOBS:
            job = _submit(client, data, settings)
            client.wait(job, timeout=200)
            found.append(_weights(client, job, tmp_path_factory.mktemp("alone")))
    return found


def _submit_together(client: Client, data: Path) -> list[str]:
    """Submit all, and wait until all are at work at one moment."""
    jobs = [_submit(client, data, settings) for settings in JOBS]
    deadline = time.monotonic() + 120
    while not all(_trains(client, job) for job in jobs):
        assert time.monotonic() < deadline, "the jobs never trained side by side"
        time.sleep(0.05)  # polling another process over HTTP
    return jobs


def _trains(client: Client, job: str) -> bool:
    info = client.job(job)
    assert not info.terminal, f"{job} was done before the others had begun"
    return (
        info.progress is not None and info.progress.stage == "training" and info.progress.done > 1
    )


def test_jobs_share_one_engine_and_each_has_the_bytes_it_has_alone(
    fleet: Fleet, data: Path, alone: list[str], tmp_path: Path
) -> None:
    with _client(fleet) as client:
        jobs = _submit_together(client, data)
        engines = _engines(fleet)
        states = [client.wait(job, timeout=200).state for job in jobs]
        found = [_weights(client, job, tmp_path) for job in jobs]

    assert len(engines) == 1
    assert states == ["succeeded"] * len(jobs)
    assert found == alone


def test_an_engine_that_dies_with_several_jobs_costs_time_and_nothing_else(
    fleet: Fleet, data: Path, alone: list[str], tmp_path: Path
) -> None:
    with _client(fleet) as client:
        jobs = _submit_together(client, data)
        for engine in _engines(fleet):
            engine.send_signal(signal.SIGKILL)
        states = [client.wait(job, timeout=200).state for job in jobs]
        outcomes = [[a.outcome for a in _training(client, job).attempts] for job in jobs]
        found = [_weights(client, job, tmp_path) for job in jobs]

    assert states == ["succeeded"] * len(jobs)
    assert [len(each) for each in outcomes] == [2] * len(jobs), outcomes
    assert all(each[-1] == "succeeded" for each in outcomes)
    assert found == alone
