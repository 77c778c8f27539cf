"""A stage's worker as a process: how it ends, and what its exit code says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from llamahome.config import Settings, load_settings
from llamahome.ledger import Ledger
from llamahome.queueing.names import queue_name
from llamahome.schemas import JobSpec, Stage, Worker
from support.redis import private_redis

CODE = (
    "import sys; from llamahome.config import load_settings; from llamahome.queueing.worker import"
    " serve; from llamahome.schemas import Stage; from support.stages import CountingStage;"
    "stage = CountingStage();"
    "sys.exit(serve(Stage.validation, stage.run, stage.key, load_settings()))"
)
SECONDS = 40.0


@contextmanager
def worker(state: Path, ledger: Ledger) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A validation worker that is up, and its log."""
    environ = {
        **os.environ, "LLAMAHOME_STATE": str(state), "LLAMAHOME_HEARTBEAT_SECONDS": "0.2",
        "LLAMAHOME_LOG_FORMAT": "json", "LLAMAHOME_SHARD_BYTES": "10",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }  # fmt: skip
    path = state / "worker.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE], env=environ, stdout=log, stderr=log, text=True
        )
    try:
        wait_for(lambda: bool(rows(ledger)), path)
        yield process, path
    finally:
        process.kill()
        process.wait()


def rows(ledger: Ledger) -> list[Worker]:
    return [row for row in ledger.workers(alive_only=True) if row.role == "validation"]


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)  # another process's doing: there is no event to wait for


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(state=tmp_path, shard_bytes=10, host="here")


@pytest.fixture
def broker(settings: Settings) -> Iterator[redis.Redis]:
    with private_redis(settings) as client:
        yield client


@pytest.mark.fleet
def test_a_loop_that_crashes_ends_with_an_error_and_its_reason(
    ledger: Ledger, settings: Settings, broker: redis.Redis
) -> None:
    assert settings.state is not None
    with worker(settings.state, ledger) as (process, log):
        broker.lpush(queue_name(Stage.validation), "not json")
        code = process.wait(SECONDS)
    assert code == 1, log.read_text()
    assert "JSONDecodeError" in log.read_text(), "the reason"
    assert "the worker's loop ended by itself" in log.read_text()


@pytest.mark.fleet
def test_one_that_is_asked_to_end_does_so_without_an_error(
    ledger: Ledger, settings: Settings, broker: redis.Redis
) -> None:
    assert settings.state is not None
    with worker(settings.state, ledger) as (process, log):
        process.send_signal(signal.SIGTERM)
        code = process.wait(SECONDS)
    assert code == 0, log.read_text()
    assert "ended by itself" not in log.read_text()


@pytest.mark.fleet
def test_one_that_cannot_write_to_its_scratch_folder_claims_nothing_until_it_can(
    ledger: Ledger,
    settings: Settings,
    broker: redis.Redis,
    make_spec: Callable[..., JobSpec],
) -> None:
    settings.scratch_root.write_text("the volume is gone")
    job, _ = ledger.submit(make_spec())
    assert settings.state is not None
    with worker(settings.state, ledger) as (_, log):
        wait_for(lambda: "cannot claim" in log.read_text(), log)
        (row,) = rows(ledger)
        assert (row.state, row.slots) == ("broken", 0)
        assert "scratch" in row.info["broken"]
        (run, *_rest) = ledger.runs(job.id)
        assert run.attempts == ()

        settings.scratch_root.unlink()
        wait_for(lambda: bool(ledger.runs(job.id)[0].attempts), log)
        wait_for(lambda: rows(ledger)[0].state in ("up", "busy"), log)
        assert rows(ledger)[0].slots == 1
