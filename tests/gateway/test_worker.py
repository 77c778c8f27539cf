"""The gateway as a process: it says where it listens, shows itself, and ends when asked."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from llamahome.config import Settings
from llamahome.errors import InvalidConfig
from llamahome.gateway.worker import URL_FILE, _listening
from llamahome.ledger import Ledger

CODE = (
    "import sys; from llamahome.config import load_settings; from llamahome.gateway import worker;"
    "sys.exit(worker.main(load_settings(heartbeat_seconds=0.2)))"
)


@pytest.fixture
def state(tmp_path: Path, empty_ledger: Path) -> Path:
    shutil.copy(empty_ledger, tmp_path / "ledger.sqlite3")
    return tmp_path


@pytest.fixture
def process(state: Path) -> Iterator[subprocess.Popen[str]]:
    environ = {**os.environ, "LLAMAHOME_STATE": str(state), "LLAMAHOME_LOG_FORMAT": "json"}
    running = subprocess.Popen(
        [sys.executable, "-c", CODE], env=environ, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    yield running
    running.kill()
    running.communicate()


def url_of(state: Path, process: subprocess.Popen[str]) -> str:
    """The URL once it is written; the process has a minute."""
    deadline = time.monotonic() + 60
    while not (state / URL_FILE).exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a file of another process: there is no event to wait for
    return (state / URL_FILE).read_text(encoding="utf-8").strip()


@pytest.mark.fleet
def test_it_serves_where_it_says_and_ends_cleanly_on_sigterm(
    state: Path, process: subprocess.Popen[str]
) -> None:
    url = url_of(state, process)
    assert httpx2.get(f"{url}/healthz").json() == {"status": "ok"}
    ledger = Ledger(f"sqlite:///{state}/ledger.sqlite3")
    (worker,) = ledger.workers()
    assert (worker.role, worker.pid, worker.state) == ("gateway", process.pid, "up")

    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert ledger.workers() == []
    ledger.close()
    assert not (state / URL_FILE).exists()
    assert out == ""
    assert [line for line in err.splitlines() if "gateway up" not in line] == []


def test_a_port_that_is_taken_is_said_so(state: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = Settings(state=state, gateway_port=port)
        with pytest.raises(InvalidConfig, match=str(port)), _listening(settings):
            pass
