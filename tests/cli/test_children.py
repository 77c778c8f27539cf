from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llamahome.cli.children import (
    DEATHS_LIMIT,
    LOG_BYTES,
    Child,
    Stops,
    end_all,
    kill_all,
    reap,
)

pytestmark = pytest.mark.fleet

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    made: list[Child] = []

    def make(script: str, name: str = "child") -> Child:
        command = [sys.executable, "-c", script]
        made.append(Child(name, command, log=tmp_path / f"{name}.log", environ=os.environ))
        return made[-1]

    yield make
    kill_all(made)


@pytest.fixture
def stops() -> Iterator[Stops]:
    with Stops().listening() as listening:
        yield listening


def _until(done: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def _end(children: list[Child], stops: Stops, *, seconds: float) -> bool:
    return end_all(children, stops, among=children, seconds=seconds, stops_limit=1)


def test_a_death_wakes_the_waiter_at_once_and_tells_the_code(
    child: Callable[[str], Child], stops: Stops
) -> None:
    short = child("import sys; print('last words'); sys.exit(3)")
    short.start()
    started = time.monotonic()
    while short.pid is not None:
        stops.wait(30)
        ended = reap([short])
        if ended:
            assert ended == [(short, 3)]
    assert time.monotonic() - started < 10
    assert short.log_tail() == ["last words"]


def test_a_child_leads_its_own_session_so_ctrl_c_at_the_terminal_does_not_reach_it(
    child: Callable[[str], Child],
) -> None:
    sleeper = child(SLEEP)
    sleeper.start()
    assert sleeper.pid is not None
    assert os.getsid(sleeper.pid) == sleeper.pid != os.getsid(0)


def test_ending_asks_first_and_kills_after_the_time_given(
    child: Callable[..., Child], stops: Stops
) -> None:
    polite, stubborn = child(SLEEP), child(STUBBORN + "print(1, flush=True); time.sleep(60)", "s")
    polite.start()
    stubborn.start()
    _until(lambda: stubborn.log_tail() == ["1"])
    started = time.monotonic()
    assert not _end([polite, stubborn], stops, seconds=0.5)
    assert 0.4 < time.monotonic() - started < 5
    assert polite.pid is None
    assert stubborn.pid is None


def test_children_that_all_end_by_themselves_are_not_waited_for_any_longer(
    child: Callable[[str], Child], stops: Stops
) -> None:
    polite = child(SLEEP)
    polite.start()
    started = time.monotonic()
    assert _end([polite], stops, seconds=30)
    assert time.monotonic() - started < 10


def test_a_second_request_to_end_kills_at_once(child: Callable[[str], Child], stops: Stops) -> None:
    stubborn = child(STUBBORN + "print(1, flush=True); time.sleep(60)")
    stubborn.start()
    _until(lambda: stubborn.log_tail() == ["1"])
    os.kill(os.getpid(), signal.SIGINT)
    assert stops.count == 1
    started = time.monotonic()
    assert not _end([stubborn], stops, seconds=30)
    assert time.monotonic() - started < 5


def test_a_dead_childs_own_children_are_ended_with_it(child: Callable[[str], Child]) -> None:
    parent = child(
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', '{SLEEP}']); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent.start()
    _until(lambda: bool(parent.log_tail()))
    grandchild = psutil.Process(int(parent.log_tail()[0]))
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    _until(lambda: bool(reap([parent])))
    _until(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


def test_the_backoff_doubles_and_five_quick_deaths_are_hopeless(
    child: Callable[[str], Child],
) -> None:
    failing = child("raise SystemExit(1)")
    waits = []
    for _ in range(DEATHS_LIMIT):
        assert not failing.hopeless
        failing.start()
        _until(lambda: reap([failing]) == [(failing, 1)])
        failing.died()
        assert failing.due_at is not None
        waits.append(failing.due_at - time.monotonic())
    assert waits == pytest.approx([0.5, 1, 2, 4, 8], abs=0.1)
    assert failing.hopeless


def test_deaths_far_apart_are_waited_for_longer_but_never_hopeless(
    child: Callable[[str], Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, now = child("raise SystemExit(1)"), [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    waits = []
    for _ in range(9):
        failing._started_at = now[0]
        now[0] += 20  # it lives for so long each time
        failing.died()
        assert not failing.hopeless
        waits.append((failing.due_at or 0) - now[0])
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    failing._started_at = now[0]
    now[0] += 3600
    failing.died()
    assert failing.due_at == now[0] + 0.5


def test_the_end_of_another_child_meanwhile_is_not_missed(
    child: Callable[..., Child], stops: Stops
) -> None:
    other, sleeper = child("pass", "other"), child(SLEEP)
    other.start()
    sleeper.start()
    _until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE)
    assert end_all([sleeper], stops, among=[other, sleeper], seconds=30, stops_limit=1)
    assert other.pid is None


def test_a_grown_log_is_set_aside_and_only_its_end_is_read(child: Callable[[str], Child]) -> None:
    talker = child("print('new')")
    talker.log.write_bytes(b"x" * (LOG_BYTES + 1))
    talker.rotate_log()
    assert not talker.log.exists()
    assert talker.log.with_name("child.log.1").stat().st_size == LOG_BYTES + 1
    talker.log.write_text("".join(f"line {i}\n" for i in range(10_000)))
    assert talker.log_tail(2) == ["line 9998", "line 9999"]


_SUPERVISOR = """
import os, sys, time
from pathlib import Path
from llamahome.cli.children import Child, adopt_orphans
adopt_orphans()
folder = Path(sys.argv[1])
sleeper = "import time; time.sleep(60)"
child = Child("c", [sys.executable, "-c", sleeper], log=folder / "c.log", environ=os.environ)
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_kill_9_of_the_supervisor_takes_its_children_along(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE
    ) as supervisor:
        assert supervisor.stdout is not None
        child = psutil.Process(int(supervisor.stdout.readline()))
        supervisor.kill()
    _until(lambda: not child.is_running())


_ORPHANS = """
import os, subprocess, sys, time
from pathlib import Path
from llamahome.cli.children import Child, adopt_orphans, kill_orphans, reap
adopt_orphans()
folder = Path(sys.argv[1])
engine = "[sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True"
script = f"import subprocess, sys; print(subprocess.Popen({engine}).pid, flush=True)"
child = Child("c", [sys.executable, "-c", script], log=folder / "c.log", environ=os.environ)
child.start()
while child.pid is not None:
    reap([child])
print(child.log_tail()[0], flush=True)
sys.stdin.readline()
print(kill_orphans([]), flush=True)
"""


def test_what_a_dead_child_left_in_another_session_is_adopted_and_ended(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ORPHANS, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as supervisor:  # fmt: skip
        assert supervisor.stdout is not None
        assert supervisor.stdin is not None
        orphan = psutil.Process(int(supervisor.stdout.readline()))
        assert orphan.ppid() == supervisor.pid
        supervisor.stdin.write("\n")
        supervisor.stdin.flush()
        assert supervisor.stdout.readline() == "1\n"
    assert not orphan.is_running()
