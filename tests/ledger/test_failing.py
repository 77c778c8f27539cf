"""What becomes of a run whose attempt failed or was lost, and of the jobs beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from llamahome.errors import LlamaHomeError, OperatorError, Unavailable
from llamahome.ledger import Claim, Ledger, failing
from llamahome.ledger.tables import job as jobs
from llamahome.ledger.tables import run as runs
from llamahome.schemas import (
    ArtifactRef,
    AttemptOutcome,
    CheckpointRef,
    JobSpec,
    JobState,
    RunState,
    Stage,
    Step,
    StopReason,
)
from support.runs import finish_stage, result_of

Spec = Callable[..., JobSpec]
Take = Callable[..., Claim | None]


def _held(claim: Claim | None) -> Claim:
    assert claim is not None
    return claim


def _training(ledger: Ledger, spec: JobSpec) -> str:
    job, _ = ledger.submit(spec)
    finish_stage(ledger, Stage.validation)
    finish_stage(ledger, Stage.preprocessing)
    return job.id


def test_a_paused_training_that_is_lost_stays_held_until_its_job_is_resumed(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _training(ledger, make_spec())
    _held(claim(Stage.training, "dies", 0.05))
    ledger.pause(job_id)
    time.sleep(0.1)
    assert ledger.sweep(rering_seconds=0) == []
    assert ledger.job(job_id).state is JobState.paused
    assert claim(Stage.training) is None
    assert ledger.resume(job_id).state is JobState.queued
    assert _held(claim(Stage.training)).fence == 2


@pytest.mark.parametrize("error", [OperatorError("a mistake"), Unavailable("away")])
def test_a_shard_that_fails_while_its_job_is_paused_stays_held(
    ledger: Ledger, make_spec: Spec, claim: Take, error: LlamaHomeError
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    held = _held(claim(Stage.validation))
    ledger.pause(job.id)
    assert ledger.fail(held, error, retry_seconds=0.01) is RunState.blocked
    time.sleep(0.05)
    assert claim(Stage.validation) is None
    assert ledger.job(job.id).state is JobState.paused
    ledger.resume(job.id)
    assert _held(claim(Stage.validation)).run_id == held.run_id


def test_a_job_that_cannot_be_read_fails_alone(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    newer, _ = ledger.submit(make_spec(shards=2))
    good, _ = ledger.submit(make_spec(tenant="other"))
    with ledger.engine.begin() as connection:
        spec = newer.spec.model_dump(mode="json") | {"speed": "double"}
        connection.execute(sa.update(jobs).where(jobs.c.id == newer.id).values(spec=spec))
    assert _held(claim(Stage.validation)).task.job_id == good.id
    failed = ledger.job(newer.id)
    assert failed.state is JobState.failed
    assert failed.error is not None
    assert "cannot be read by this release: speed: Extra inputs" in failed.error.message
    assert "bring every worker up to date" in failed.error.message
    first, second, *_ = ledger.runs(newer.id)
    assert (first.state, second.state) == (RunState.parked, RunState.cancelled)
    assert first.attempts[0].outcome is AttemptOutcome.failed
    with ledger.engine.connect() as connection:
        query = sa.select(runs.c.last_error).where(runs.c.id == first.id)
        assert "speed" in connection.execute(query).scalar_one()["message"]
    listed, _ = ledger.jobs(None)
    assert [job.id for job in listed] == [good.id, newer.id], "and hides nobody in a listing"


def test_runs_lost_together_end_with_their_job(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    """The last try of one of them fails the job: the other one must not be claimable after it."""
    job, _ = ledger.submit(make_spec(shards=2))
    for _ in range(2):
        assert _held(claim(Stage.validation, "dies", 0.05)).task.shard == 0
        time.sleep(0.1)
    assert _held(claim(Stage.validation, "dies", 0.05)).task.shard == 0
    assert _held(claim(Stage.validation, "dies", 0.05)).task.shard == 1
    time.sleep(0.1)
    ledger.sweep(rering_seconds=0)
    assert ledger.job(job.id).state is JobState.failed
    assert claim(Stage.validation) is None
    states = [run.state for run in ledger.runs(job.id)[:2]]
    assert states == [RunState.parked, RunState.cancelled]


def test_a_claim_under_way_is_ended_by_the_cancel_that_waits_for_it(
    ledger: Ledger, make_spec: Spec, claim: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = ledger.submit(make_spec(shards=2))
    _held(claim(Stage.validation))
    claiming, note_start = threading.Event(), ledger._note_start

    def slow_start(*values: Any) -> None:
        claiming.set()
        time.sleep(0.3)  # within the claim's transaction: the cancel must run into it
        note_start(*values)

    monkeypatch.setattr(ledger, "_note_start", slow_start)
    worker = threading.Thread(target=claim, args=(Stage.validation,))
    worker.start()
    assert claiming.wait(5)
    ledger.cancel(job.id)
    worker.join()
    outcomes = [attempt.outcome for run in ledger.runs(job.id) for attempt in run.attempts]
    assert outcomes == [AttemptOutcome.cancelled] * 2


def _try(ledger: Ledger, claim: Take, error: LlamaHomeError) -> RunState:
    """Claim the one run there is, as soon as its wait is over, and fail it."""
    until = time.monotonic() + 5
    while (held := claim(Stage.validation)) is None:
        assert time.monotonic() < until, "nothing to claim"
        time.sleep(0.005)
    return ledger.fail(held, error, retry_seconds=0.001)


def test_what_does_not_answer_costs_the_job_no_attempt(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    for _ in range(5):
        assert _try(ledger, claim, Unavailable("storage is away")) is RunState.ready
    run = ledger.runs(job.id)[0]
    assert run.attempts_without_progress == 0
    assert [attempt.outcome for attempt in run.attempts] == [AttemptOutcome.retried] * 5
    states = [_try(ledger, claim, OperatorError("a mistake")) for _ in range(3)]
    assert states == [RunState.ready, RunState.ready, RunState.parked]


def test_an_outage_of_minutes_is_waited_out_with_ever_longer_pauses_of_a_minute_at_most(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    ledger.submit(make_spec(shards=1))
    waits = []
    for _ in range(6):
        held = _held(claim(Stage.validation))
        ledger.fail(held, Unavailable("away"), retry_seconds=1.0)
        with ledger.engine.begin() as connection:
            wait = connection.execute(
                sa.select(runs.c.not_before - runs.c.ready_at).where(runs.c.id == held.run_id)
            ).scalar_one()
            connection.execute(sa.update(runs).values(not_before=None))
        waits.append(round(wait))
    assert waits == [1, 4, 16, 60, 60, 60]


def test_an_outage_that_does_not_end_fails_the_job(
    ledger: Ledger, make_spec: Spec, claim: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "OUTAGE_SECONDS", 0.2)
    job, _ = ledger.submit(make_spec(shards=1))
    began, states = time.monotonic(), [RunState.ready]
    while states[-1] is RunState.ready:
        states.append(_try(ledger, claim, Unavailable("storage is away")))
        assert time.monotonic() < began + 10, "tried for ever"
    assert states[-1] is RunState.parked
    assert time.monotonic() - began >= 0.2
    error = ledger.job(job.id).error
    assert error is not None
    assert (error.code, error.message) == ("internal_error", "unavailable: storage is away")


def test_a_checkpoint_ends_an_outage_and_a_drain_does_not(
    ledger: Ledger, make_spec: Spec, claim: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(held: Claim) -> int:
        """The attempts that count now; an outage older than 0.1 s makes this one count."""
        ledger.fail(held, Unavailable("away"), retry_seconds=0.001)
        time.sleep(0.15)
        return ledger.runs(job_id)[-1].attempts_without_progress

    monkeypatch.setattr(failing, "OUTAGE_SECONDS", 0.1)
    job_id = _training(ledger, make_spec())
    assert fail(_held(claim(Stage.training))) == 0
    ledger.release(_held(claim(Stage.training)), StopReason.drain)
    assert fail(_held(claim(Stage.training))) == 1
    held = _held(claim(Stage.training))
    artifact = ArtifactRef(digest="1", path="jobs/1", bytes=1)
    ledger.checkpoint(held, CheckpointRef(step=1, artifact=artifact))
    assert fail(held) == 0
    done = _held(claim(Stage.training))
    assert done.task.step is Step.train
    ledger.complete(done, result_of(done))


def test_unreadable_inputs_fail_their_job_too(ledger: Ledger, make_spec: Spec, claim: Take) -> None:
    job_id = _training(ledger, make_spec())
    values: dict[str, Any] = {"checkpoint": {"step": "none"}}
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(runs).where(runs.c.stage == Stage.training).values(**values))
    assert claim(Stage.training) is None
    assert ledger.job(job_id).state is JobState.failed
