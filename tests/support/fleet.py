"""A real fleet on this machine, started by `llamahome up` and spoken to by its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

READY_SECONDS = 120.0
END_SECONDS = 40.0
FAST = {
    "LLAMAHOME_LEASE_SECONDS": "4",
    "LLAMAHOME_SWEEP_SECONDS": "0.5",
    "LLAMAHOME_RERING_SECONDS": "2",
    "LLAMAHOME_HEARTBEAT_SECONDS": "1",
    "LLAMAHOME_SHARD_BYTES": "65536",
    "LLAMAHOME_THREADS": "1",
    "LLAMAHOME_LOG_FORMAT": "json",
    "OMP_NUM_THREADS": "1",
}


class Fleet:
    """One `llamahome up`, its state folder, and commands against it."""

    def __init__(self, state: Path, environ: dict[str, str]) -> None:
        self.state = state
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("LLAMAHOME_")},
            **FAST,
            **environ,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start and wait for the line `ready URL`."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llamahome.cli", "up", "--state", str(self.state)],
            stdout=subprocess.PIPE,
            text=True,
            env=self.environ,
        )
        assert self.process.stdout is not None
        watchdog = threading.Timer(READY_SECONDS, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                if line.startswith("ready "):
                    return
        finally:
            watchdog.cancel()
        raise AssertionError(f"the fleet never became ready; see {self.state}/logs")

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(END_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def run(self, *words: str, timeout: float = 180.0) -> subprocess.CompletedProcess[str]:
        """A command of the command line against this fleet."""
        return subprocess.run(
            [sys.executable, "-m", "llamahome.cli", *words, "--state", str(self.state)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environ,
        )

    def json(self, *words: str) -> Any:
        """The same with --json; it must succeed."""
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def endpoint(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.state / "endpoint.json").read_text())
        return content

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def process_of(self, *words: str) -> psutil.Process:
        """The main process of `llamahome WORDS`, a direct child of `up`."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            if child.cmdline()[-len(words) :] == list(words):
                return child
        raise AssertionError(f"no process {words}: {[c.cmdline() for c in self.children()]}")


@contextmanager
def running_fleet(state: Path, **environ: str) -> Iterator[Fleet]:
    """A fleet for the length of the block; nothing of it is left afterwards."""
    fleet = Fleet(state, environ)
    fleet.start()
    try:
        yield fleet
    finally:
        left = fleet.children()
        code = fleet.stop()
        assert code == 0, f"`up` ended with {code}"
        assert [child for child in left if child.is_running()] == [], "a child was left behind"
