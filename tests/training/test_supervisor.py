"""The supervisor against a stand-in for the engine that speaks the real messages, without torch."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamahome.config import Settings
from llamahome.errors import Fenced, Stopped, TrainingFailed, WorkerLost
from llamahome.schemas import BaseRef, JobSpec, StopReason
from llamahome.training import supervisor
from llamahome.training.process import EngineProcess
from llamahome.training.supervisor import Session, WarmEngine
from llamahome.training.wire import Admit, Progress, Stop

PRELUDE = """\
import argparse, os, signal, socket, sys, time
from llamahome.errors import TrainingFailed
from llamahome.training.wire import *
parser = argparse.ArgumentParser()
parser.add_argument("--channel", type=int)
parser.add_argument("--parent", type=int)
channel = Channel(socket.socket(fileno=parser.parse_args().channel))
"""
READY = "channel.send(Ready(pid=os.getpid()))\n"
PROGRESS = "channel.send(Progress(job='j', done=1, total=9, data={}))\n"
ADMITTED = READY + "channel.receive(None)\n" + PROGRESS

Start = Callable[..., tuple[EngineProcess, Callable[[], Any]]]


@pytest.fixture
def base() -> BaseRef:
    """A name only: nothing here loads a model."""
    return BaseRef(name="test/base", path="/nowhere", digest="d" * 64)


@pytest.fixture
def start(tmp_path: Path, make_spec: Callable[..., JobSpec], ports: Any) -> Iterator[Start]:
    """A stand-in with that body, and the call that runs a job on it."""
    started = []

    def go(body: str, **settings: float) -> tuple[EngineProcess, Callable[[], Any]]:
        script = tmp_path / "stand_in.py"
        script.write_text(PRELUDE + body)
        engine = EngineProcess(tmp_path, 1, command=(sys.executable, str(script)))
        started.append(engine)
        admit = Admit(
            job="j", spec=make_spec(), data="/d", scratch="/s", device="cpu", threads=1,
        )  # fmt: skip
        session = Session(engine.line("j"), ports, Settings(state=tmp_path, **settings))
        return engine, lambda: session.run(admit)

    yield go
    for engine in started:
        engine.close()


def test_an_engine_that_says_nothing_for_too_long_is_killed(start: Start) -> None:
    engine, run = start(ADMITTED + "time.sleep(60)", stall_seconds=0.3)

    with pytest.raises(WorkerLost, match="no word from the engine for 0"):
        run()

    assert not engine.alive()


def test_how_the_engine_died_and_its_last_words_are_in_the_error(start: Start) -> None:
    _, run = start(ADMITTED + "print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")  # fmt: skip # noqa: E501

    with pytest.raises(WorkerLost, match="signal 11") as caught:
        run()

    assert "SIGSEGV" in caught.value.message
    assert "last words" in caught.value.message


def test_an_exit_status_is_told(start: Start) -> None:
    _, run = start(ADMITTED + "sys.exit(7)")

    with pytest.raises(WorkerLost, match="exit status 7"):
        run()


def test_an_engine_that_does_not_come_up_is_told_of(start: Start) -> None:
    _, run = start("raise RuntimeError('no driver')")

    with pytest.raises(WorkerLost, match="no driver"):
        run()


def test_garbage_on_the_channel_ends_the_engine(start: Start) -> None:
    engine, run = start(ADMITTED + "channel._sock.sendall(b'garbage\\n'); time.sleep(60)")

    with pytest.raises(WorkerLost, match="sent no message"):
        run()

    assert not engine.alive()


def test_a_fenced_job_is_killed_at_once_with_all_that_it_started(start: Start, ports: Any) -> None:
    child = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
    engine, run = start(READY + child + ADMITTED.removeprefix(READY) + "time.sleep(60)")
    ports.stop_at[1] = StopReason.fenced
    began = time.monotonic()

    with pytest.raises(Fenced):
        run()

    assert time.monotonic() - began < 10
    assert not engine.alive()
    pid = int(engine.tail().split()[-1])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("reason", [StopReason.cancel, StopReason.pause])
def test_an_engine_that_does_not_stop_in_time_is_killed(
    start: Start, ports: Any, reason: StopReason
) -> None:
    engine, run = start(ADMITTED + "time.sleep(60)", drain_seconds=0.3)
    ports.stop_at[1] = reason

    with pytest.raises(Stopped) as caught:
        run()

    assert caught.value.code == reason
    assert not engine.alive()


def test_a_stop_before_the_engine_is_ready_leaves_it_starting(start: Start, ports: Any) -> None:
    engine, run = start("time.sleep(0.5)\n" + READY + "channel.receive(None)")
    ports.stop_at[0] = StopReason.cancel

    with pytest.raises(Stopped):
        run()

    assert engine.alive()


FAIL = (
    "error = TrainingFailed('no', code='nan_loss').to_dict()\n"
    "channel.send(Failed(job='j', error=error, fatal={}))\n"
)


def test_a_failed_job_leaves_the_engine_warm_and_a_fatal_one_does_not(start: Start) -> None:
    for fatal in (False, True):
        engine, run = start(ADMITTED + FAIL.format(fatal) + "channel.receive(None)")

        with pytest.raises(TrainingFailed) as caught:
            run()

        assert caught.value.code == "nan_loss"
        assert engine.alive() is not fatal


SAVING = """
os.makedirs({folder!r}, exist_ok=True)
channel.receive(None)
channel.send(Saved(job='j', folder={folder!r}, step=4, eval_loss=None, best=False))
print(channel.receive(None).kind, flush=True)
channel.send(Halted(job="j", reason="drain", message="stopped"))
channel.receive(None)
"""


@pytest.mark.parametrize("leaving", [SystemExit, KeyboardInterrupt])
def test_a_supervisor_that_must_leave_stores_a_checkpoint_first(
    start: Start, ports: Any, tmp_path: Path, leaving: type[BaseException]
) -> None:
    engine, run = start(ADMITTED + SAVING.format(folder=str(tmp_path / "checkpoint-00000004")))

    def leave(done: int) -> None:
        raise leaving

    ports.on_progress = leave
    with pytest.raises(leaving):
        run()

    assert [point.step for point in ports.points] == [4]
    assert engine.tail() == "; its last output:\nstored"
    assert engine.alive()  # warm still; whoever ends the process ends it


def test_a_supervisor_that_must_leave_does_not_wait_for_ever(start: Start, ports: Any) -> None:
    engine, run = start(ADMITTED + "time.sleep(60)", drain_seconds=0.3)

    def leave(done: int) -> None:
        raise SystemExit(1)

    ports.on_progress = leave
    with pytest.raises(SystemExit) as caught:
        run()

    assert "had not saved in 0.3 s" in caught.value.__notes__[0]
    assert not engine.alive()


def test_a_storage_that_fails_ends_the_job_and_leaves_the_engine_to_the_others(
    start: Start, ports: Any, tmp_path: Path
) -> None:
    body = READY + "channel.receive(None)\n" + SAVING.format(folder=str(tmp_path / "c")).replace(
        "channel.receive(None)\n", "", 1
    )  # fmt: skip
    engine, run = start(body)

    def publish(folder: Path, kind: str) -> None:
        raise OSError(28, os.strerror(28))

    ports.publish = publish
    with pytest.raises(OSError, match="No space left"):
        run()

    assert ports.points == []
    assert engine.tail() == "; its last output:\nstop"
    assert engine.alive()


TWO = (
    READY + "jobs = [channel.receive(None).job, channel.receive(None).job]\n"
    "for job in jobs: channel.send(Progress(job=job, done=1, total=9, data={}))\n"
)
# As the real one: what was heard during a tick is answered after it.
SLOW_TICKS = (
    TWO
    + """
while jobs:
    time.sleep(1)
    for job in jobs: channel.send(Progress(job=job, done=2, total=9, data={}))
    while (heard := channel.receive(0)) is not None:
        if isinstance(heard, Stop):
            print(heard.job, "let go", flush=True)
            channel.send(Halted(job=heard.job, reason=heard.reason, message="stopped"))
            jobs.remove(heard.job)
"""
)


class Pair:
    """Jobs "a" and "b" on one engine, each run in a thread; how each ended is in ``ended``."""

    def __init__(
        self, engine: EngineProcess, spec: JobSpec, settings: Settings, ports: dict[str, Any]
    ) -> None:
        self.ended: dict[str, BaseException] = {}
        self._threads = {}
        for job in ports:
            session = Session(engine.line(job), ports[job], settings)
            admit = Admit(job=job, spec=spec, data="/d", scratch="/s", device="cpu", threads=1)
            thread = threading.Thread(target=self._run, args=(job, session, admit))
            self._threads[job] = thread
            thread.start()

    def _run(self, job: str, session: Session, admit: Admit) -> None:
        try:
            session.run(admit)
        except BaseException as error:
            self.ended[job] = error

    def join(self, job: str) -> None:
        self._threads[job].join(30)
        assert not self._threads[job].is_alive()


@pytest.fixture
def pair(
    tmp_path: Path, make_spec: Callable[..., JobSpec], make_ports: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., tuple[EngineProcess, dict[str, Any], Pair]]]:  # fmt: skip
    started = []
    monkeypatch.setattr(supervisor, "_LEAVE_SECONDS", 0.2)

    def go(
        body: str, stops: dict[str, dict[int, StopReason]], **settings: float
    ) -> tuple[EngineProcess, dict[str, Any], Pair]:
        script = tmp_path / "two.py"
        script.write_text(PRELUDE + body)
        engine = EngineProcess(tmp_path, 1, command=(sys.executable, str(script)))
        started.append(engine)
        ports = {job: make_ports(job, stops.get(job)) for job in ("a", "b")}
        return (
            engine, ports,
            Pair(engine, make_spec(), Settings(state=tmp_path, **settings), ports),
        )  # fmt: skip

    yield go
    for engine in started:
        engine.close()


def test_one_that_leaves_waits_for_the_end_of_a_long_tick_and_the_others_go_on(pair: Any) -> None:
    engine, ports, both = pair(SLOW_TICKS, {"a": {1: StopReason.fenced}})

    both.join("a")
    assert isinstance(both.ended["a"], Fenced)
    assert "a let go" in engine.tail(), "its folder may be removed only when nothing writes there"
    assert engine.alive()
    ports["b"].stop_at[2] = StopReason.cancel
    both.join("b")
    assert isinstance(both.ended["b"], Stopped)


def test_an_engine_that_says_nothing_to_anybody_is_killed_by_one_that_leaves(pair: Any) -> None:
    engine, _, both = pair(
        TWO + "time.sleep(60)", {"a": {1: StopReason.fenced}}, stall_seconds=1.5
    )  # fmt: skip

    both.join("a")
    both.join("b")
    assert not engine.alive()
    assert isinstance(both.ended["a"], Fenced)
    assert isinstance(both.ended["b"], WorkerLost)


def test_an_engine_that_everybody_leaves_is_not_waited_for(pair: Any) -> None:
    stops = {job: {1: StopReason.fenced} for job in ("a", "b")}
    began = time.monotonic()
    engine, _, both = pair(TWO + "time.sleep(60)", stops)

    both.join("a")
    both.join("b")
    assert time.monotonic() - began < 30
    assert not engine.alive()


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[WarmEngine]:
    script = tmp_path / "idle.py"
    script.write_text(PRELUDE + READY + "channel.receive(None)")
    warm = WarmEngine(command=(sys.executable, str(script)))
    yield warm
    warm.shutdown()


def test_a_live_engine_is_kept_and_a_dead_one_replaced(warm: WarmEngine, tmp_path: Path) -> None:
    settings = Settings(state=tmp_path)
    with warm.lease(settings, "j") as line:
        first = line.engine
    with warm.lease(settings, "j") as line:
        assert line.engine is first
        first.kill()
    with warm.lease(settings, "j") as line:
        third = line.engine
        assert third.alive()
        assert third.pid != first.pid

    warm.shutdown()
    warm.shutdown()

    assert not third.alive()


def test_jobs_side_by_side_share_the_engine_and_hear_of_themselves_only(
    tmp_path: Path,
) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        PRELUDE + READY + "channel.send(Progress(job='a', done=1, total=9, data={}))\n"
        "channel.send(Progress(job='b', done=2, total=9, data={}))\nchannel.receive(None)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    warm = WarmEngine(command=(sys.executable, str(script)))
    settings = Settings(state=tmp_path)
    with warm.lease(settings, "a") as one, warm.lease(settings, "b") as other:
        assert one.engine is other.engine
        for line, done in ((one, 1), (other, 2)):
            message = line.receive(20)
            assert isinstance(message, Progress)
            assert message.done == done
        one.send(Stop(job="a", reason=StopReason.cancel))
        for line in (one, other):
            with pytest.raises(WorkerLost, match="SIGKILL"):
                line.receive(20)
    warm.shutdown()


def test_an_engine_started_from_a_thread_outlives_that_thread(tmp_path: Path) -> None:
    """The parent-death signal is the starting thread's."""
    script = tmp_path / "idle.py"
    die = "import ctypes; ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)\n"
    script.write_text(PRELUDE + die + READY + "channel.receive(None)")
    warm = WarmEngine(command=(sys.executable, str(script)))
    settings = Settings(state=tmp_path)
    found = []

    def use() -> None:
        with warm.lease(settings, "j") as line:
            assert wait_ready(line.engine)
            found.append(line.engine)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    try:
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(found[0].pid).wait(0.5)
        assert found[0].alive()
    finally:
        warm.shutdown()


def test_a_forked_copy_lets_go_of_the_engine_without_touching_it(
    warm: WarmEngine, tmp_path: Path
) -> None:
    settings = Settings(state=tmp_path)
    with warm.lease(settings, "j") as line:
        engine = line.engine
        assert wait_ready(engine)
    child = os.fork()
    if child == 0:
        warm.shutdown()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    with warm.lease(settings, "j") as again:
        assert again.engine is engine
        assert engine.alive()


def wait_ready(engine: EngineProcess) -> bool:
    return any(engine.ready() for _ in range(100))
