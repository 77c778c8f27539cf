from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamahome.cli.lock import Holder, holder, locked
from llamahome.errors import InvalidState


def test_a_second_holder_is_refused_with_pid_and_url(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        with (
            pytest.raises(InvalidState, match=f"pid {os.getpid()}, still starting"),
            locked(tmp_path),
        ):
            raise AssertionError
        lock.announce("http://127.0.0.1:5")
        with pytest.raises(InvalidState, match=r"http://127\.0\.0\.1:5"), locked(tmp_path):
            raise AssertionError


def test_whoever_asks_is_told_the_holder(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with locked(tmp_path) as lock:
        assert holder(tmp_path) == Holder(os.getpid(), None)
        lock.announce("http://x")
        assert holder(tmp_path) == Holder(os.getpid(), "http://x")
    assert holder(tmp_path) is None


def test_somebody_who_only_asks_cannot_make_up_fail(tmp_path: Path) -> None:
    (tmp_path / "up.lock").touch()
    with (tmp_path / "up.lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        timer = threading.Timer(0.03, lambda: fcntl.flock(asking, fcntl.LOCK_UN))
        timer.start()
        with locked(tmp_path):
            timer.join()


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; from llamahome.cli.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert holder(tmp_path) == Holder(process.pid, None)
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        assert holder(tmp_path) == Holder(os.getpid(), None)
