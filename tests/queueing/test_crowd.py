"""Several runs in one worker: who may join whom, and how they all leave."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest

from llamahome.config import Settings
from llamahome.errors import Stopped, WorkerLost
from llamahome.ledger import Ledger
from llamahome.queueing.crowd import Crowd
from llamahome.queueing.runner import StageRunner
from llamahome.schemas import (
    AttemptOutcome,
    BaseRef,
    JobSpec,
    JobState,
    Ports,
    RunState,
    Stage,
    StageFunction,
    StageResult,
    StageTask,
    StopReason,
)
from support.stages import CountingStage

MakeRunner = Callable[..., StageRunner]
MakeSpec = Callable[..., JobSpec]
MakeCrowd = Callable[..., Crowd]


@pytest.fixture
def make_crowd(make_runner: MakeRunner, settings: Settings) -> MakeCrowd:
    def make(function: StageFunction, slots: int = 4) -> Crowd:
        return Crowd(make_runner(Stage.training, function), slots, settings)

    return make


@pytest.fixture
def ready(ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec) -> Callable[..., str]:
    """A job whose training is ready to be claimed."""

    def submit(content: str, base: str = "tiny") -> str:
        spec = make_spec(content=content)
        ref = BaseRef(name=base, path=f"/bases/{base}", digest="b" * 64)
        job, _ = ledger.submit(spec.model_copy(update={"base": ref}))
        for stage in (Stage.validation, Stage.preprocessing):
            make_runner(stage).work()
        return job.id

    return submit


class Together:
    """A training that ends only when so many are at work at once."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.stage = CountingStage()

    def __call__(self, task: StageTask, ports: Ports) -> StageResult:
        self.barrier.wait(timeout=20)
        return self.stage.run(task, ports)


def until_told(started: threading.Semaphore) -> StageFunction:
    """A training that ends when it is asked to, and only then."""

    def function(task: StageTask, ports: Ports) -> StageResult:
        started.release()
        deadline = time.monotonic() + 30
        while (reason := ports.should_stop()) is None and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        assert reason is not None, "nobody asked it to stop"
        raise Stopped("stopped", code=reason.value)

    return function


def test_jobs_of_one_base_are_at_work_at_once(
    ledger: Ledger, make_crowd: MakeCrowd, ready: Callable[..., str]
) -> None:
    jobs = [ready(name) for name in "abc"]

    assert make_crowd(Together(3)).work() == 3

    assert [ledger.job(job).state for job in jobs] == [JobState.succeeded] * 3


def test_the_warm_base_and_the_free_slots_are_told(
    make_runner: MakeRunner, settings: Settings, ready: Callable[..., str]
) -> None:
    told: list[tuple[str, int]] = []
    runner = make_runner(Stage.training, Together(2))
    for name in "ab":
        ready(name)

    Crowd(runner, 4, settings, lambda base, free: told.append((base, free))).work()

    assert told[0] == ("tiny", 3)
    assert ("tiny", 2) in told
    assert told[-1] == ("tiny", 4)


def test_there_are_never_more_than_slots(
    ledger: Ledger, make_crowd: MakeCrowd, ready: Callable[..., str]
) -> None:
    jobs = [ready(name) for name in "abcde"]
    stage, lock = CountingStage(), threading.Lock()
    at_work, most = 0, 0

    def function(task: StageTask, ports: Ports) -> StageResult:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        try:
            return stage.run(task, ports)
        finally:
            with lock:
                at_work -= 1

    assert make_crowd(function, slots=2).work() == 5
    assert most <= 2
    assert {ledger.job(job).state for job in jobs} == {JobState.succeeded}


def test_a_job_of_another_base_waits_until_the_slots_are_empty(
    make_crowd: MakeCrowd, ready: Callable[..., str]
) -> None:
    stage, lock = CountingStage(), threading.Lock()
    bases: list[str] = []
    seen: list[set[str]] = []

    def function(task: StageTask, ports: Ports) -> StageResult:
        with lock:
            bases.append(task.spec.base.name)
            seen.append(set(bases))
        try:
            threading.Event().wait(0.2)  # long enough for the others to be claimed
            return stage.run(task, ports)
        finally:
            with lock:
                bases.remove(task.spec.base.name)

    for content, base in (("a", "tiny"), ("b", "other"), ("c", "tiny"), ("d", "other")):
        ready(content, base)

    assert make_crowd(function).work() == 4
    assert all(len(each) == 1 for each in seen), seen


def test_a_job_that_comes_while_others_are_at_work_joins_them(
    make_crowd: MakeCrowd, ready: Callable[..., str]
) -> None:
    together = Together(2)
    ready("a")
    worker = threading.Thread(target=make_crowd(together).work)
    worker.start()
    ready("b")
    worker.join(20)

    assert not worker.is_alive()
    assert not together.barrier.broken


def test_the_last_try_of_a_run_that_made_no_progress_is_alone(
    ledger: Ledger, make_crowd: MakeCrowd, ready: Callable[..., str], settings: Settings
) -> None:
    """Three jobs crash the engine twice; then each runs by itself, and the good ones succeed."""
    jobs = {ready(name): name for name in "abc"}
    poison = next(iter(jobs))
    stage, lock = CountingStage(), threading.Lock()
    at_work: set[str] = set()
    company: list[tuple[int, int]] = []

    def function(task: StageTask, ports: Ports) -> StageResult:
        with lock:
            at_work.add(task.job_id)
        try:
            threading.Event().wait(0.2)
            with lock:
                company.append((task.fence, len(at_work)))
            if task.fence < 3 or task.job_id == poison:
                raise WorkerLost("the engine was killed by signal 11")
            return stage.run(task, ports)
        finally:
            with lock:
                at_work.discard(task.job_id)

    crowd = make_crowd(function)
    deadline = time.monotonic() + 40
    while any(not ledger.job(job).state.terminal for job in jobs) and time.monotonic() < deadline:
        crowd.work()
        threading.Event().wait(0.1)  # until the pause between attempts has passed

    states = {name: ledger.job(job).state for job, name in jobs.items()}
    assert states == {"a": JobState.failed, "b": JobState.succeeded, "c": JobState.succeeded}
    assert [count for fence, count in company if fence == 3] == [1, 1, 1]
    assert max(count for _, count in company) == 3


def test_a_worker_that_must_leave_hands_every_run_back(
    ledger: Ledger, make_crowd: MakeCrowd, ready: Callable[..., str], settings: Settings
) -> None:
    jobs = [ready(name) for name in "abc"]
    started = threading.Semaphore(0)
    crowd = make_crowd(until_told(started))

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGUSR1, leave)

    def ask() -> None:
        for _ in jobs:
            started.acquire(timeout=20)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with pytest.raises(SystemExit):
            crowd.work()
    finally:
        signal.signal(signal.SIGUSR1, before)
        asking.join()

    for job in jobs:
        (run,) = [run for run in ledger.runs(job) if run.stage is Stage.training]
        assert run.state is RunState.ready
        assert run.attempts_without_progress == 0
        assert run.attempts[-1].outcome is AttemptOutcome.released
    assert list(settings.scratch_root.iterdir()) == []


def test_one_cancelled_job_leaves_the_others_at_work(
    ledger: Ledger, make_crowd: MakeCrowd, ready: Callable[..., str]
) -> None:
    first, second = ready("a"), ready("b")
    started = threading.Semaphore(0)
    reasons: dict[str, StopReason | None] = {}
    release = threading.Event()
    stage = CountingStage()

    def function(task: StageTask, ports: Ports) -> StageResult:
        started.release()
        while ports.should_stop() is None and not release.wait(0.02):
            pass
        reasons[task.job_id] = ports.should_stop()
        if reasons[task.job_id] is not None:
            raise Stopped("stopped", code=reasons[task.job_id])
        return stage.run(task, ports)

    worker = threading.Thread(target=make_crowd(function).work)
    worker.start()
    for _ in range(2):
        assert started.acquire(timeout=20)
    ledger.cancel(first)
    deadline = time.monotonic() + 20
    while first not in reasons and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    release.set()
    worker.join(20)

    assert reasons == {first: StopReason.cancel, second: None}
    assert ledger.job(first).state is JobState.cancelled
    assert ledger.job(second).state is JobState.succeeded
