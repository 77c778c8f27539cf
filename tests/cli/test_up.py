"""`llamahome up` with its real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path

import psutil
import pytest

from llamahome.cli.bases import base_digest
from llamahome.cli.context import Endpoint, read_endpoint
from llamahome.client import Client
from llamahome.config import private_redis_socket
from llamahome.ledger import Ledger

from .conftest import RunCommand

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

ROLES = {"coordinator", "gateway", "validation", "preprocessing", "training", "submissions"}


def _until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def of_state(state: Path) -> dict[int, str]:
    """Every process that was started for this state folder: pid to command line."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get("LLAMAHOME_STATE") == str(state)
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
    return found


class Up:
    """A running `llamahome up`; what it says on stderr goes to a file."""

    def __init__(self, state: Path, *options: str) -> None:
        self.state = state
        self.errors = state.parent / f"up-{time.monotonic_ns()}.err"
        command = [sys.executable, "-m", "llamahome.cli", "up", "--state", str(state), *options]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )

    def ready(self) -> str:
        """Wait for the line and return the URL."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready http://127.0.0.1:"), self.errors.read_text()
        return line.split()[1]

    @property
    def endpoint(self) -> Endpoint | None:
        return read_endpoint(self.state / "endpoint.json")

    def ours(self) -> dict[int, str]:
        return of_state(self.state)

    def main_pid(self, words: str) -> int:
        """The main process of a role: the child of `up` with these words."""
        for process in psutil.Process(self.process.pid).children():
            if words in " ".join(process.cmdline()):
                return process.pid
        raise AssertionError(f"no {words!r} below up")


@pytest.fixture
def state(tmp_path: Path, base_folder: Path) -> Path:
    """A state folder with a base, so that none is made first."""
    folder = tmp_path / "state"
    folder.mkdir()
    with contextlib.closing(Ledger(f"sqlite:///{folder}/ledger.sqlite3")) as ledger:
        ledger.upgrade()
        ledger.add_base("tiny", str(base_folder), base_digest(base_folder))
    return folder


@pytest.fixture
def up(state: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*options: str) -> Up:
        started.append(Up(state, *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
        _until(partial(_gone, one), 20)


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _gone(fleet: Up) -> bool:
    return not fleet.ours()


def test_a_fleet_starts_serves_heals_refuses_a_second_and_ends_without_a_trace(
    up: Callable[..., Up], state: Path, llamahome: RunCommand
) -> None:
    fleet = up()
    url = fleet.ready()

    endpoint = fleet.endpoint
    assert endpoint is not None
    assert (endpoint.url, endpoint.pid) == (url, fleet.process.pid)
    assert stat.S_IMODE((state / "endpoint.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    with Client(endpoint.url, endpoint.key) as client:
        assert {worker.role for worker in client.workers()} >= ROLES
    assert llamahome("health", f"{url}/healthz").code == 0
    assert llamahome("jobs", "--state", state, "--json").json == []

    second = up()
    assert second.process.wait(30) == 1
    refusal = second.errors.read_text()
    assert f"a fleet already runs here (pid {fleet.process.pid}, {url})" in refusal
    assert refusal.count("\n") == 1

    worker = fleet.main_pid("worker validation")
    os.kill(worker, signal.SIGKILL)
    _until(lambda: "validation ended (killed by SIGKILL)" in fleet.errors.read_text())

    _until(lambda: _runs(fleet, "worker validation"))
    assert fleet.main_pid("worker validation") != worker
    redis = fleet.main_pid("redis-server")
    os.kill(redis, signal.SIGKILL)
    _until(lambda: "redis ended (killed by SIGKILL)" in fleet.errors.read_text())
    _until(lambda: private_redis_socket(state).exists())

    started = time.monotonic()
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.process.wait(40) == 0
    assert time.monotonic() - started < 30
    assert fleet.ours() == {}
    assert fleet.endpoint is None
    assert not private_redis_socket(state).exists()
    assert fleet.errors.read_text().endswith("stopped\n")


def test_kill_9_leaves_nothing_and_the_next_up_goes_on_with_the_same_key(
    up: Callable[..., Up], state: Path
) -> None:
    fleet = up()
    fleet.ready()
    before = fleet.endpoint
    below = psutil.Process(fleet.process.pid).children(recursive=True)
    assert len(below) >= len(ROLES) + 1
    os.kill(fleet.process.pid, signal.SIGKILL)
    fleet.process.wait()
    _until(lambda: not any(map(_alive, below)), 20)

    again = up()
    again.ready()
    after = again.endpoint
    assert before is not None
    assert after is not None
    assert after.key == before.key
    assert after.pid == again.process.pid
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(40) == 0
    assert again.ours() == {}


def test_a_process_that_dies_during_the_start_ends_it_with_the_tail_of_its_log(
    up: Callable[..., Up], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_STORAGE_URL", "nonsense")
    fleet = up()
    assert fleet.process.wait(90) == 4
    said = fleet.errors.read_text()
    assert "'nonsense' is no URL" in said
    assert "ended during the start (exit code" in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("error: ")
    assert fleet.ours() == {}


def test_asked_to_end_while_it_starts_it_ends_without_a_trace(up: Callable[..., Up]) -> None:
    fleet = up()
    _until(lambda: "started coordinator" in fleet.errors.read_text())
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.process.wait(40) == 0
    assert fleet.ours() == {}
    assert fleet.endpoint is None


def test_a_taken_port_is_refused_before_anything_starts(up: Callable[..., Up]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fleet = up("--port", str(port))
        assert fleet.process.wait(30) == 1
    assert f"--port: 127.0.0.1:{port} cannot be listened on" in fleet.errors.read_text()
    assert fleet.ours() == {}


def test_a_process_that_dies_again_and_again_ends_it_with_exit_4(up: Callable[..., Up]) -> None:
    fleet = up()
    fleet.ready()
    for death in range(1, 6):
        _until(lambda: fleet.process.poll() is not None or _runs(fleet, "coordinator"))
        os.kill(fleet.main_pid("llamahome.cli coordinator"), signal.SIGKILL)
        _until(partial(_told, fleet, "coordinator ended", death))
    assert fleet.process.wait(40) == 4
    last = fleet.errors.read_text().splitlines()[-1]
    assert "coordinator ended 5 times within 60 s, last: killed by SIGKILL" in last
    assert fleet.ours() == {}


def _told(fleet: Up, text: str, times: int) -> bool:
    return fleet.errors.read_text().count(text) >= times


def _runs(fleet: Up, words: str) -> bool:
    with contextlib.suppress(AssertionError):
        return bool(fleet.main_pid(f"llamahome.cli {words}"))
    return False


def test_a_second_ctrl_c_ends_it_at_once_even_with_a_worker_that_hangs(
    up: Callable[..., Up],
) -> None:
    fleet = up()
    fleet.ready()
    os.kill(fleet.main_pid("worker preprocessing"), signal.SIGSTOP)
    fleet.process.send_signal(signal.SIGINT)
    _until(lambda: "stopping" in fleet.errors.read_text())
    _until(lambda: not _runs(fleet, "gateway"))
    assert fleet.process.poll() is None
    started = time.monotonic()
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.process.wait(20) == 0
    assert time.monotonic() - started < 10
    assert fleet.ours() == {}


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_demo_trains_the_sample_on_a_fleet_of_its_own_and_leaves_nothing_running(
    tmp_path: Path,
) -> None:
    state = tmp_path / "demo-state"
    command = [sys.executable, "-m", "llamahome.cli", "demo", "--json", "--state", str(state)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout)
    assert made["job"]["state"] == "succeeded"
    losses = made["report"]["training"]
    assert losses["eval_loss_after"] < losses["eval_loss_before"]
    adapter = Path(made["adapter"])
    assert adapter == state / "demo" / made["job"]["id"] / "adapter"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {
        p.name for p in adapter.iterdir()
    }
    with contextlib.closing(Ledger(f"sqlite:///{state}/ledger.sqlite3")) as ledger:
        runs = ledger.runs(made["job"]["id"])
    shards = [run for run in runs if run.stage == "preprocessing" and run.step == "shard"]
    assert len(shards) > 2, "the sample is shared out to several workers"
    assert "validation" in ran.stderr
    assert "\x1b" not in ran.stderr
    assert of_state(state) == {}


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_end_in_the_middle_of_a_training_takes_the_engine_along(
    tmp_path: Path, llamahome: RunCommand, number: signal.Signals
) -> None:
    fleet = Up(tmp_path / "state")
    try:
        fleet.ready()
        sample = resources.files("llamahome.conversations") / "samples" / "support.jsonl"
        job_id = llamahome(
            "submit", str(sample), "--base", "tiny", "--recipe", "quick", "--set", "epochs=50",
            "--state", fleet.state,
        ).out.strip()  # fmt: skip

        def training() -> bool:
            shown = llamahome("show", job_id, "--state", fleet.state, "--json").json
            progress = shown["job"]["progress"]
            return shown["job"]["state"] == "running" and bool(progress and progress["done"])

        _until(training, 120)
        below = psutil.Process(fleet.process.pid).children(recursive=True)
        assert any("llamahome.training.engine" in " ".join(one.cmdline()) for one in below)
        started = time.monotonic()
        fleet.process.send_signal(number)
        assert fleet.process.wait(40) == (0 if number is signal.SIGINT else -number)
        _until(lambda: not any(map(_alive, below)), 5)
        assert time.monotonic() - started < 30
    finally:
        fleet.process.kill()
        fleet.process.communicate()
