"""What happens around a stage: the runner, the lease and the doorbells, with real parts."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Settings
from llamahome.coordinator import Sweeper
from llamahome.errors import InvalidData, Stopped, Unavailable
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import FaultyBell
from llamahome.queueing.lease import LeaseKeeper
from llamahome.queueing.runner import StageRunner
from llamahome.schemas import (
    AttemptOutcome,
    JobSpec,
    JobState,
    Ports,
    Run,
    RunState,
    Stage,
    StageResult,
    StageTask,
    StopReason,
)
from llamahome.storage import Storage
from support.stages import CountingStage

MakeRunner = Callable[..., StageRunner]
MakeSpec = Callable[..., JobSpec]


def _first_run(ledger: Ledger, job_id: str) -> Run:
    return ledger.runs(job_id)[0]


def _work_off(make_runner: MakeRunner) -> None:
    for stage in Stage:
        make_runner(stage).work()


def test_a_job_is_worked_off_and_its_artifacts_lie_where_the_layout_says(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, storage: Storage
) -> None:
    job, _ = ledger.submit(make_spec(shards=2))
    _work_off(make_runner)
    done = ledger.job(job.id)
    assert done.state is JobState.succeeded
    assert done.adapter is not None
    assert done.adapter.path == f"models/{job.id}/f1"
    assert storage.manifest(done.adapter.path).files[0].name == "shard.txt"
    messages = [event.message for event in ledger.events(job.id)[0]]
    assert "training train 0 worked" in messages


def test_equal_work_is_done_once_for_two_jobs_of_a_tenant_and_again_for_another(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, stage: CountingStage
) -> None:
    """BEHAVIOUR 80: work that comes again is not done again."""
    for tenant, expected in (("acme", 1), ("acme", 1), ("other", 2)):
        job, _ = ledger.submit(make_spec(tenant=tenant))
        _work_off(make_runner)
        assert ledger.job(job.id).state is JobState.succeeded
        assert stage.executed["validation/shard/0"] == expected
    assert stage.executed["training/train/0"] == 3, "a training is never taken from the cache"
    runs = ledger.runs(ledger.jobs("acme")[0][0].id)
    assert [run.attempts[0].cached for run in runs] == [True] * 5 + [False]


def test_a_kept_result_whose_files_are_gone_is_made_again(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    stage: CountingStage,
    storage: Storage,
) -> None:
    ledger.submit(make_spec())
    _work_off(make_runner)
    job, _ = ledger.submit(make_spec())
    held = ledger.claim(Stage.validation, "peek", host="h", pid=1, lease_seconds=9)
    assert held is not None
    path = f"artifacts/{stage.key(held.task)}"
    ledger.release(held, StopReason.drain)
    storage.delete(path)
    _work_off(make_runner)
    assert ledger.job(job.id).state is JobState.succeeded
    assert stage.executed["validation/shard/0"] == 2
    assert storage.exists(path)


def _raise(error: BaseException) -> Callable[[StageTask, Ports], StageResult]:
    def function(task: StageTask, ports: Ports) -> StageResult:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (InvalidData("bad row", line=3), RunState.failed, "invalid_training_file"),
        (Unavailable("away"), RunState.ready, "unavailable"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), RunState.ready, "disk_full"),
        (ZeroDivisionError("oops"), RunState.ready, "internal_error"),
    ],
)
def test_each_kind_of_error_means_what_the_error_tree_says(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    error: BaseException,
    state: RunState,
    code: str,
) -> None:
    """BEHAVIOUR 76: each failure of a stage is typed, a full disk too."""
    job, _ = ledger.submit(make_spec())
    runner = make_runner(function=_raise(error))
    assert runner.work() == 1
    run = _first_run(ledger, job.id)
    assert run.state is state
    recorded = run.attempts[0].error
    assert recorded is not None
    assert recorded["code"] == code


def test_a_run_that_was_asked_to_drain_is_ready_again_at_no_cost(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, settings: Settings
) -> None:
    job, _ = ledger.submit(make_spec())
    with pytest.raises(SystemExit):
        make_runner(function=_raise(SystemExit(0))).work()
    run = _first_run(ledger, job.id)
    assert run.state is RunState.ready
    assert run.attempts_without_progress == 0
    assert run.attempts[0].outcome is AttemptOutcome.released
    assert list(settings.scratch_root.iterdir()) == [], "the scratch folder must be gone"


def test_a_cancelled_job_stops_its_stage_within_a_renewal(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec
) -> None:
    job, _ = ledger.submit(make_spec())
    entered = threading.Event()

    def wait_for_stop(task: StageTask, ports: Ports) -> StageResult:
        entered.set()
        until = time.monotonic() + 10
        while (reason := ports.should_stop()) is None and time.monotonic() < until:
            threading.Event().wait(0.02)
        assert reason is not None, "the cancel never arrived"
        raise Stopped("stopped", code=reason)

    worker = threading.Thread(target=make_runner(function=wait_for_stop).work)
    worker.start()
    assert entered.wait(5)
    ledger.cancel(job.id)
    worker.join(timeout=5)
    assert not worker.is_alive()
    assert _first_run(ledger, job.id).attempts[0].outcome is AttemptOutcome.cancelled


def test_progress_and_events_reach_the_ledger_while_the_stage_works(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec
) -> None:
    job, _ = ledger.submit(make_spec())
    seen = threading.Event()

    def report(task: StageTask, ports: Ports) -> StageResult:
        ports.progress(3, 10, {"loss": 1.5})
        ports.event("half way", data={"step": 3})
        until = time.monotonic() + 5
        while time.monotonic() < until and not seen.is_set():
            run = _first_run(ledger, job.id)
            if run.progress == {"done": 3, "total": 10, "data": {"loss": 1.5}}:
                seen.set()
            seen.wait(0.05)
        return StageResult()

    make_runner(function=report).work()
    assert seen.is_set()
    event = next(event for event in ledger.events(job.id)[0] if event.message == "half way")
    assert (event.kind, event.data) == ("metrics", {"step": 3})


def test_what_a_stage_said_before_it_failed_is_told_before_the_failure(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec
) -> None:
    job, _ = ledger.submit(make_spec())

    def function(task: StageTask, ports: Ports) -> StageResult:
        ports.event("first")
        threading.Event().wait(0.3)  # "first" is sent; the next renewal is up to a second away
        ports.event("what led to it", level="warn")
        raise InvalidData("no good")

    make_runner(function=function).work()
    messages = [event.message for event in ledger.events(job.id)[0]]
    assert messages[-3:] == ["first", "what led to it", "no good"]


@pytest.mark.parametrize("end", [Stopped("enough", code="drain"), SystemExit(0)])
def test_what_a_stage_said_before_it_was_handed_back_is_told(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, end: BaseException
) -> None:
    job, _ = ledger.submit(make_spec())
    said = 0

    def function(task: StageTask, ports: Ports) -> StageResult:
        nonlocal said
        said += 1
        if said > 1:
            return StageResult()
        ports.event("first")
        threading.Event().wait(0.3)
        ports.event("second")
        raise end

    with contextlib.suppress(SystemExit):
        make_runner(function=function).work()
    messages = [event.message for event in ledger.events(job.id)[0]]
    assert messages.index("first") < messages.index("second")
    assert messages.index("second") < messages.index("validation handed back by its worker")


def test_what_a_stage_says_last_is_told_though_a_renewal_is_under_way(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal that holds events and is slower than the completion must not lose them."""
    job, _ = ledger.submit(make_spec())
    renewing = threading.Event()
    renew = ledger.renew

    def slow(*args: Any, **given: Any) -> Any:
        renewing.set()
        threading.Event().wait(0.5)
        return renew(*args, **given)

    monkeypatch.setattr(ledger, "renew", slow)

    def function(task: StageTask, ports: Ports) -> StageResult:
        ports.event(f"the last word of {task.step}")
        assert renewing.wait(5)
        return StageResult()

    make_runner(function=function).work()
    assert "the last word of shard" in [event.message for event in ledger.events(job.id)[0]]


def test_a_worker_cut_off_from_the_ledger_stops_before_its_lease_ends(
    ledger: Ledger, make_spec: MakeSpec
) -> None:
    """Nothing renews: the keeper must fence itself at 0.8 of the lease, on its own clock."""
    ledger.submit(make_spec())
    claim = ledger.claim(Stage.validation, "w", host="h", pid=1, lease_seconds=0.5)
    assert claim is not None
    away = Ledger("postgresql://nobody@127.0.0.1:9/none?connect_timeout=1")
    began = time.monotonic()
    with LeaseKeeper(away, claim) as keeper:
        while keeper.reason is None and time.monotonic() < began + 5:
            threading.Event().wait(0.01)
        waited = time.monotonic() - began
    assert keeper.reason is StopReason.fenced
    assert 0.35 <= waited < 0.5


def test_thirty_jobs_survive_a_bell_that_drops_and_doubles_a_third(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    settings: Settings,
) -> None:
    """BEHAVIOUR 80: lost and doubled messages are harmless."""
    doors: dict[Stage, queue.Queue[bool]] = {stage: queue.Queue() for stage in Stage}
    bell = FaultyBell(lambda stage, recover: doors[stage].put(recover), seed=7)
    jobs = [ledger.submit(make_spec(shards=2, content=f"{n:x}"[-1]))[0].id for n in range(30)]
    stop = threading.Event()

    def serve(stage: Stage, name: str) -> None:
        runner = make_runner(stage, bell=bell, worker=name)
        while not stop.is_set():
            try:
                doors[stage].get(timeout=0.05)
            except queue.Empty:
                continue
            runner.work()

    threads = [
        threading.Thread(target=serve, args=(stage, f"{stage}-{n}"))
        for stage in Stage
        for n in range(2)
    ]
    threads.append(threading.Thread(target=Sweeper(ledger, bell, settings).run, args=(stop,)))
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while time.monotonic() < until and ledger.active_jobs("acme"):
        stop.wait(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert [ledger.job(job).state for job in jobs] == [JobState.succeeded] * 30
    assert bell.dropped > 10
    for job in jobs:
        for run in ledger.runs(job):
            won = [a for a in run.attempts if a.outcome is AttemptOutcome.succeeded]
            assert len(won) == 1


def test_a_storage_that_cannot_be_written_is_tried_again_until_it_can(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    stage: CountingStage,
    tmp_path: Path,
) -> None:
    job, _ = ledger.submit(make_spec())
    (tmp_path / "storage").mkdir(exist_ok=True)
    (tmp_path / "storage" / "artifacts").write_text("in the way")  # no folder can be made here
    make_runner().work()
    assert _first_run(ledger, job.id).state in (RunState.ready, RunState.parked)
    (tmp_path / "storage" / "artifacts").unlink()
    until = time.monotonic() + 5
    while time.monotonic() < until and _first_run(ledger, job.id).state is not RunState.done:
        make_runner().work()
    assert _first_run(ledger, job.id).state is RunState.done
