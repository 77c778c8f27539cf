"""The ledger's promises, on every database it supports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from llamahome.errors import (
    Fenced,
    InvalidConfig,
    InvalidData,
    InvalidState,
    NotFound,
    OperatorError,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from llamahome.ledger import Claim, Ledger
from llamahome.ledger.tables import metadata
from llamahome.schemas import (
    ArtifactRef,
    AttemptOutcome,
    CheckpointRef,
    JobSpec,
    JobState,
    NewEvent,
    RunState,
    Stage,
    StageResult,
    Step,
    StopReason,
)
from support.runs import finish_stage, result_of

Spec = Callable[..., JobSpec]
Take = Callable[..., Claim | None]


def _training(ledger: Ledger, spec: JobSpec) -> str:
    """A job whose training run is ready; returns its id."""
    job, _ = ledger.submit(spec)
    finish_stage(ledger, Stage.validation)
    finish_stage(ledger, Stage.preprocessing)
    return job.id


def test_migrations_make_exactly_the_tables_the_code_uses(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []


def test_a_schema_of_another_version_is_refused(ledger_url: str) -> None:
    empty = Ledger(ledger_url)
    with pytest.raises(InvalidState, match="ledger upgrade"):
        empty.check_revision()
    empty.upgrade()
    empty.upgrade()
    empty.check_revision()
    empty.close()


def test_the_clock_is_the_databases_and_moves_within_a_second_of_ours(ledger: Ledger) -> None:
    assert ledger.clock() == pytest.approx(time.time(), abs=1.0)


def test_a_job_goes_from_accepted_to_succeeded_through_every_stage(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, created = ledger.submit(make_spec(shards=3))
    assert created
    assert job.state is JobState.accepted
    states = [job.state]
    while ledger.job(job.id).state is not JobState.succeeded:
        held = next(filter(None, (claim(stage) for stage in Stage)))
        states.append(ledger.job(job.id).state)
        ledger.complete(held, result_of(held))
        states.append(ledger.job(job.id).state)
    order = list(dict.fromkeys(states))
    assert order == [
        JobState.accepted, JobState.validating, JobState.preparing, JobState.queued,
        JobState.running, JobState.succeeded,
    ]  # fmt: skip
    runs = ledger.runs(job.id)
    assert [(run.stage, run.step, run.shard) for run in runs] == [
        (Stage.validation, Step.shard, 0),
        (Stage.validation, Step.shard, 1),
        (Stage.validation, Step.shard, 2),
        (Stage.validation, Step.close, 0),
        (Stage.preprocessing, Step.shard, 0),
        (Stage.preprocessing, Step.shard, 1),
        (Stage.preprocessing, Step.close, 0),
        (Stage.training, Step.train, 0),
    ]
    assert all(run.state is RunState.done and len(run.attempts) == 1 for run in runs)
    assert [out.shard for out in ledger.outputs(job.id)] == [0, 1, 2, 0, 0, 1, 0, 0]
    done = ledger.job(job.id)
    assert done.adapter is not None
    assert done.finished_at is not None


def test_the_close_step_is_ready_only_after_the_last_shard(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    ledger.submit(make_spec(shards=2))
    first, second = claim(Stage.validation), claim(Stage.validation)
    assert first is not None
    assert second is not None
    ledger.complete(second, result_of(second))
    assert claim(Stage.validation) is None
    ledger.complete(first, result_of(first))
    close = claim(Stage.validation)
    assert close is not None
    assert close.task.step is Step.close
    assert [out.summary["shard"] for out in close.task.inputs] == [0, 1]


def test_the_same_submission_id_answers_the_first_job(ledger: Ledger, make_spec: Spec) -> None:
    first, created = ledger.submit(make_spec(), submission_id="s-1")
    again, created_again = ledger.submit(make_spec(shards=9), submission_id="s-1")
    other, created_other = ledger.submit(make_spec(tenant="other"), submission_id="s-1")
    assert (created, created_again, created_other) == (True, False, True)
    assert first.id == again.id != other.id


def test_twenty_threads_submitting_one_id_make_one_job(ledger: Ledger, make_spec: Spec) -> None:
    made: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: made.append(ledger.submit(make_spec(), submission_id="x")[0].id)
        )
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 20
    assert len(set(made)) == 1


def test_of_twenty_submissions_at_once_a_quota_lets_just_so_many_through(
    ledger: Ledger, make_spec: Spec
) -> None:
    answers: list[str] = []
    together = threading.Barrier(20)

    def submit(number: int) -> None:
        together.wait()
        try:
            job, _ = ledger.submit(make_spec(), submission_id=f"s-{number % 10}", quota=2)
        except QuotaExceeded as error:
            answers.append(error.message)
        else:
            answers.append(job.id)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = {job.id for job in ledger.jobs("acme")[0]}
    assert len(made) == 2
    assert set(answers) == made | {"2 jobs are in flight and 2 are allowed"}
    assert len([answer for answer in answers if answer in made]) == 4, "each was asked for twice"
    with pytest.raises(QuotaExceeded):
        ledger.check_quota("acme", 2)
    ledger.cancel(made.pop())
    assert ledger.submit(make_spec(), quota=2)[1]
    assert ledger.submit(make_spec(tenant="other"), quota=1)[1]


def test_threads_that_claim_at_once_never_share_a_run(ledger: Ledger, make_spec: Spec) -> None:
    ledger.submit(make_spec(shards=40))
    taken: list[str] = []

    def work(name: str) -> None:
        while (
            held := ledger.claim(Stage.validation, name, host="h", pid=1, lease_seconds=60)
        ) is not None:
            taken.append(held.run_id)
            if held.task.step is Step.close:
                return
            ledger.complete(held, result_of(held))

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 41


def test_an_expired_lease_is_taken_back_and_the_late_commit_is_refused(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    late = claim(Stage.validation, "frozen", 0.05)
    assert late is not None
    time.sleep(0.1)  # the lease itself is the event: it must run out on the database's clock
    fresh = claim(Stage.validation, "fresh")
    assert fresh is not None
    assert (fresh.run_id, fresh.fence) == (late.run_id, late.fence + 1)
    with pytest.raises(Fenced):
        ledger.complete(late, result_of(late))
    with pytest.raises(Fenced):
        ledger.fail(late, OperatorError("late"))
    point = CheckpointRef(step=1, artifact=ArtifactRef(digest="c", path="p", bytes=1))
    with pytest.raises(Fenced):
        ledger.checkpoint(late, point)
    assert ledger.renew(late) is StopReason.fenced
    ledger.complete(fresh, result_of(fresh))
    outcomes = [attempt.outcome for attempt in ledger.runs(job.id)[0].attempts]
    assert outcomes == [AttemptOutcome.lost, AttemptOutcome.succeeded]


def test_renewing_keeps_a_lease_alive_past_its_first_term(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation, "slow", 0.4)
    assert held is not None
    for _ in range(4):
        time.sleep(0.2)  # together twice the lease
        assert ledger.renew(held) is None
    assert claim(Stage.validation, "other") is None
    ledger.complete(held, result_of(held))


def test_three_losses_without_progress_park_the_run_and_fail_the_job(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    for _ in range(3):
        assert claim(Stage.validation, "dies", 0.01) is not None
        time.sleep(0.03)
    assert claim(Stage.validation, "dies", 0.01) is None
    failed = ledger.job(job.id)
    assert failed.state is JobState.failed
    assert failed.error is not None
    assert failed.error.code == "worker_lost"
    assert ledger.runs(job.id)[0].state is RunState.parked


def test_a_new_checkpoint_is_progress_and_resets_the_attempts(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _training(ledger, make_spec())
    for step in range(1, 6):
        held = claim(Stage.training, "dies", 0.05)
        assert held is not None, f"parked before step {step}"
        expected = None if step == 1 else step - 1
        assert (held.task.resume.step if held.task.resume else None) == expected
        artifact = ArtifactRef(digest=f"{step}", path=f"jobs/{step}", bytes=1)
        ledger.checkpoint(held, CheckpointRef(step=step, artifact=artifact))
        time.sleep(0.1)
    assert [point.step for _, point in ledger.checkpoints(job_id)] == [1, 2, 3, 4, 5]
    assert ledger.job(job_id).state is not JobState.failed


def test_a_checkpoint_whose_answer_was_lost_may_be_said_again(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _training(ledger, make_spec())
    held = claim(Stage.training)
    assert held is not None
    for step in (1, 2):
        artifact = ArtifactRef(digest=f"{step}", path=f"jobs/{step}", bytes=1)
        point = CheckpointRef(step=step, artifact=artifact)
        first = ledger.checkpoint(held, point, keep=1)
        assert [gone.step for gone in first] == ([] if step == 1 else [1])
        assert ledger.checkpoint(held, point, keep=1) == []
    assert [point.step for _, point in ledger.checkpoints(job_id)] == [2]


def test_only_the_newest_checkpoints_and_the_best_stay_known(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _training(ledger, make_spec())
    held = claim(Stage.training, "dies", 0.5)
    assert held is not None
    dropped = []
    for step in range(1, 7):
        artifact = ArtifactRef(digest=f"{step}", path=f"jobs/{step}", bytes=1)
        point = CheckpointRef(step=step, artifact=artifact, best=step in (1, 2))
        dropped += [gone.step for gone in ledger.checkpoint(held, point, keep=2)]
    assert dropped == [1, 3, 4, 5]
    assert [point.step for _, point in ledger.checkpoints(job_id)] == [2, 6]
    time.sleep(0.6)
    again = claim(Stage.training)
    assert again is not None
    assert again.task.resume is not None
    assert again.task.resume.step == 6
    assert [point.step for point in again.task.earlier] == [2]


def test_a_run_joins_others_of_its_base_only_and_the_last_try_joins_nobody(
    ledger: Ledger, make_spec: Spec
) -> None:
    def take(warm_base: str, beside: bool = True) -> Claim | None:
        return ledger.claim(
            Stage.training, "w", host="here", pid=1, lease_seconds=0.05, warm_base=warm_base,
            beside=beside,
        )  # fmt: skip

    _training(ledger, make_spec())
    assert take("other") is None
    for number in (1, 2):
        held = take("tiny")
        assert held is not None, f"try {number}"
        assert not held.alone
        time.sleep(0.1)
    assert take("tiny") is None
    last = take("tiny", beside=False)
    assert last is not None
    assert last.alone


def test_nobody_joins_while_another_base_has_waited_for_too_long(
    ledger: Ledger, make_spec: Spec
) -> None:
    def take(affinity_seconds: float) -> Claim | None:
        return ledger.claim(
            Stage.training, "w", host="here", pid=1, lease_seconds=30, warm_base="tiny",
            affinity_seconds=affinity_seconds, beside=True,
        )  # fmt: skip

    _training(ledger, make_spec(base="other"))
    for _ in range(2):
        _training(ledger, make_spec())
    time.sleep(0.05)
    assert take(60.0) is not None
    assert take(0.01) is None


def test_a_users_error_fails_the_job_at_once_and_cancels_the_rest(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=2))
    held, sibling = claim(Stage.validation), claim(Stage.validation)
    assert held is not None
    assert sibling is not None
    error = InvalidData("no valid row", file="a.jsonl", line=3)
    assert ledger.fail(held, error) is RunState.failed
    failed = ledger.job(job.id)
    assert failed.state is JobState.failed
    assert failed.error is not None
    assert failed.error.message == "a.jsonl:3: no valid row"
    assert ledger.renew(sibling) is StopReason.fenced
    states = {run.state for run in ledger.runs(job.id)}
    assert states == {RunState.failed, RunState.cancelled}


def test_an_error_of_ours_is_tried_again_later_and_parked_in_the_end(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    for n in range(3):
        held = claim(Stage.validation)
        assert held is not None
        state = ledger.fail(held, OperatorError("a mistake"), retry_seconds=0.3)
        assert state is (RunState.parked if n == 2 else RunState.ready)
        assert claim(Stage.validation) is None, "the backoff must hold it back"
        time.sleep(0.3 * 4**n + 0.05)
    assert ledger.job(job.id).state is JobState.failed


def test_a_released_run_costs_no_attempt(ledger: Ledger, make_spec: Spec, claim: Take) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    for _ in range(5):
        held = claim(Stage.validation)
        assert held is not None
        ledger.release(held, StopReason.drain)
    run = ledger.runs(job.id)[0]
    assert (run.state, run.attempts_without_progress, run.fence) == (RunState.ready, 0, 5)


def test_cancel_ends_the_job_at_once_and_the_worker_hears_it(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation)
    assert held is not None
    assert ledger.cancel(job.id).state is JobState.cancelled
    assert ledger.cancel(job.id).state is JobState.cancelled
    assert ledger.renew(held) is StopReason.cancel
    with pytest.raises(Fenced):
        ledger.complete(held, result_of(held))
    assert all(run.state is RunState.cancelled for run in ledger.runs(job.id))


def test_an_ended_job_can_be_neither_cancelled_nor_paused(ledger: Ledger, make_spec: Spec) -> None:
    job_id = _training(ledger, make_spec())
    finish_stage(ledger, Stage.training)
    for act in (ledger.cancel, ledger.pause, ledger.resume):
        with pytest.raises(InvalidState, match="succeeded"):
            act(job_id)


def test_a_paused_training_is_held_and_goes_on_where_it_was(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _training(ledger, make_spec())
    held = claim(Stage.training)
    assert held is not None
    assert ledger.pause(job_id).state is JobState.running
    assert ledger.renew(held) is StopReason.pause
    ledger.release(held, StopReason.pause)
    assert ledger.job(job_id).state is JobState.paused
    assert claim(Stage.training) is None
    assert ledger.sweep(rering_seconds=0) == []
    assert ledger.resume(job_id).state is JobState.queued
    assert claim(Stage.training) is not None


def test_a_job_paused_between_stages_waits_there(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation)
    assert held is not None
    assert ledger.pause(job.id).state is JobState.paused
    ledger.complete(held, result_of(held))
    assert claim(Stage.validation) is None
    ledger.resume(job.id)
    close = claim(Stage.validation)
    assert close is not None
    assert close.task.step is Step.close


def test_a_small_tenant_is_served_beside_one_that_has_flooded_the_queue(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    for _ in range(20):
        ledger.submit(make_spec(tenant="big", shards=1))
    ledger.submit(make_spec(tenant="small", shards=1))
    served = []
    for _ in range(4):
        held = claim(Stage.validation)
        assert held is not None
        served.append(held.tenant)
    assert "small" in served[:2]


def test_fair_share_follows_the_worker_time_that_a_tenant_has_had(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    for tenant in ("slow", "quick"):
        for _ in range(6):
            ledger.submit(make_spec(tenant=tenant, shards=1))
    served = []
    for _ in range(6):
        held = claim(Stage.validation)
        assert held is not None
        served.append(held.tenant)
        if held.tenant == "slow":
            time.sleep(0.4)  # what it is charged for
        ledger.complete(held, result_of(held))
    assert served.count("quick") > served.count("slow")


def test_a_warm_base_goes_first_unless_another_has_waited_too_long(
    ledger: Ledger, make_spec: Spec
) -> None:
    _training(ledger, make_spec(base="cold"))
    _training(ledger, make_spec(base="warm"))

    def next_base(affinity_seconds: float) -> str:
        held = ledger.claim(
            Stage.training, "w", host="h", pid=1, lease_seconds=9, warm_base="warm",
            affinity_seconds=affinity_seconds,
        )  # fmt: skip
        assert held is not None
        ledger.release(held, StopReason.drain)
        return held.task.spec.base.name

    assert next_base(60.0) == "warm"
    assert next_base(0.0) == "cold"


def test_the_sweeper_names_what_is_unrung_and_recovers_first(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    ledger.submit(make_spec(shards=3))
    assert ledger.sweep(rering_seconds=60) == [], "a fresh job counts as rung by its submitter"
    assert claim(Stage.validation, "dies", 0.01) is not None
    time.sleep(0.03)
    rings = ledger.sweep(rering_seconds=60)
    assert [(ring.stage, ring.recover, ring.runs) for ring in rings] == [
        (Stage.validation, True, 1)
    ]
    again = ledger.sweep(rering_seconds=0)
    assert [(ring.recover, ring.runs) for ring in again] == [(True, 1), (False, 2)]
    assert ledger.sweep(rering_seconds=60) == []


def test_events_come_in_order_and_page_both_ways(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation)
    assert held is not None
    ledger.renew(held, events=[NewEvent(message=f"event {n}") for n in range(5)])
    page, more = ledger.events(job.id, limit=4)
    assert more
    rest, more = ledger.events(job.id, after=page[-1].seq)
    assert not more
    messages = [event.message for event in (*page, *rest)]
    assert messages[0].startswith("Created fine-tuning job")
    assert messages[-5:] == [f"event {n}" for n in range(5)]
    newest, _ = ledger.events(job.id, limit=1, newest_first=True)
    assert newest[0].message == "event 4"


def test_jobs_page_newest_first_without_repeats_and_by_tenant(
    ledger: Ledger, make_spec: Spec
) -> None:
    made = [ledger.submit(make_spec())[0].id for _ in range(5)]
    ledger.submit(make_spec(tenant="other"))
    seen: list[str] = []
    after = None
    while True:
        page, more = ledger.jobs("acme", after=after, limit=2)
        seen += [job.id for job in page]
        after = seen[-1]
        if not more:
            break
    assert seen == made[::-1]
    found, _ = ledger.jobs("acme", metadata={"team": "acme"})
    assert len(found) == 5
    assert ledger.jobs("acme", metadata={"team": "x"}) == ([], False)
    odd = {'a"b\\': "1", "größe": "x"}
    spec = make_spec().model_copy(update={"metadata": odd})
    marked, _ = ledger.submit(spec)
    assert [job.id for job in ledger.jobs("acme", metadata=odd)[0]] == [marked.id]
    assert ledger.jobs("acme", without_metadata=True) == ([], False)
    with pytest.raises(NotFound):
        ledger.job(made[0], "other")


def test_a_kept_result_belongs_to_its_tenant(ledger: Ledger, make_spec: Spec, claim: Take) -> None:
    ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation)
    assert held is not None
    result = result_of(held)
    ledger.complete(held, result, key="k" * 64)
    assert ledger.cached("acme", "k" * 64) == result
    assert ledger.cached("other", "k" * 64) is None
    ledger.forget("acme", "k" * 64)
    assert ledger.cached("acme", "k" * 64) is None


def test_keys_are_kept_as_digests_and_map_to_their_tenant(ledger: Ledger) -> None:
    made = ledger.create_key("acme")
    assert ledger.tenant_of(made.key) == "acme"
    with pytest.raises(Unauthenticated):
        ledger.tenant_of(made.key + "x")
    with ledger.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM api_key")).all()
    assert made.key not in str(rows)


def test_an_unknown_base_names_the_nearest_one(ledger: Ledger) -> None:
    ledger.add_base("tiny-llama", "/bases/tiny", "d" * 64)
    with pytest.raises(NotFound, match="Did you mean 'tiny-llama'"):
        ledger.base("tiny-lama")


def test_files_belong_to_their_tenant_until_deleted(ledger: Ledger) -> None:
    made = ledger.add_file(
        "acme", filename="a.jsonl", purpose="fine-tune", path="u/a", sha256="a" * 64, bytes=3
    )
    assert ledger.file(made.id, "acme") == made
    assert ledger.files("acme")[0] == [made]
    with pytest.raises(NotFound):
        ledger.file(made.id, "other")
    ledger.delete_file(made.id, "acme")
    with pytest.raises(NotFound):
        ledger.file(made.id, "acme")


def test_a_process_that_stops_its_heartbeat_shows_and_what_it_holds(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    facts = {"role": "validation", "host": "h", "pid": 7, "version": "1", "slots": 1}
    ledger.heartbeat("worker-1", state="busy", metrics_port=9, info={}, **facts)  # type: ignore[arg-type]
    ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation, "worker-1")
    assert held is not None
    (seen,) = ledger.workers()
    assert (seen.state, seen.holds, seen.metrics_port) == ("busy", (held.run_id,), 9)
    ledger.heartbeat("worker-1", state="stopped", metrics_port=9, info={}, **facts)  # type: ignore[arg-type]
    assert ledger.workers() == []


def test_the_facts_equal_the_records(ledger: Ledger, make_spec: Spec, claim: Take) -> None:
    _training(ledger, make_spec())
    finish_stage(ledger, Stage.training)
    bad, _ = ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation)
    assert held is not None
    ledger.fail(held, InvalidData("bad"))
    ledger.submit(make_spec(shards=2), kind="celery")
    facts = ledger.facts(unrung_seconds=0)
    assert facts.jobs["succeeded"] == 1
    assert facts.finished == {("succeeded", ""): 1, ("failed", "invalid_training_file"): 1}
    assert facts.submitted == {"http": 2, "celery": 1}
    assert facts.runs_ready["validation"] == facts.runs_unrung["validation"] == 2
    assert facts.attempts["validation", "succeeded"] == 3
    assert facts.attempts["validation", "failed"] == 1


def test_a_training_without_an_adapter_is_our_own_mistake(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    _training(ledger, make_spec())
    held = claim(Stage.training)
    assert held is not None
    with pytest.raises(AssertionError, match="adapter"):
        ledger.complete(held, StageResult())
    ledger.complete(held, result_of(held))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mysql://x/y", "not supported"),
        ("nonsense", "not a database URL"),
        ("sqlite://", "would lose jobs"),
    ],
)
def test_a_url_that_cannot_be_a_ledger_is_refused(url: str, text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        Ledger(url)


def test_a_database_that_does_not_answer_is_named_without_its_password() -> None:
    away = Ledger("postgresql://user:secret@127.0.0.1:9/none?connect_timeout=1")
    with pytest.raises(Unavailable) as caught:
        away.clock()
    assert "secret" not in str(caught.value)
    assert "doctor" in str(caught.value)
