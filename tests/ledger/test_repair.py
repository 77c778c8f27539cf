"""A finished run is done again where an attempt finds its artifact damaged."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llamahome.errors import DamagedArtifact, Fenced, OperatorError, Unavailable
from llamahome.ledger import Claim, Ledger
from llamahome.schemas import ArtifactRef, JobSpec, JobState, RunState, Stage, StageResult, Step
from support.runs import finish_stage, result_of

Spec = Callable[..., JobSpec]
Take = Callable[..., Claim | None]

ERROR = DamagedArtifact("changed")
GONE = "artifacts/0"


def _validated(ledger: Ledger, spec: JobSpec) -> str:
    """A job whose preprocessing shards are ready; its first validation shard left ``GONE``."""
    job, _ = ledger.submit(spec)
    first = ledger.claim(Stage.validation, "w", host="here", pid=1, lease_seconds=30)
    assert first is not None
    ref = ArtifactRef(digest="d" * 64, path=GONE, bytes=1)
    ledger.complete(first, StageResult(artifact=ref), key="k" * 64)
    finish_stage(ledger, Stage.validation)
    return job.id


def test_its_readers_wait_until_it_is_done_again(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _validated(ledger, make_spec())
    reader = claim(Stage.preprocessing)
    assert reader is not None
    advanced = ledger.rebuild(reader, GONE, ERROR)
    assert advanced is not None
    assert (advanced.state, advanced.stage, advanced.ready) == (
        JobState.validating, Stage.validation, 1,
    )  # fmt: skip
    assert ledger.cached("acme", "k" * 64) is None
    assert claim(Stage.preprocessing) is None, "its sibling would be claimed with an input missing"
    states = {(run.stage, run.step, run.shard): run.state for run in ledger.runs(job_id)}
    assert states[Stage.validation, Step.shard, 0] is RunState.ready
    assert states[Stage.validation, Step.shard, 1] is RunState.done
    assert states[Stage.preprocessing, Step.shard, 0] is RunState.blocked

    source = claim(Stage.validation)
    assert source is not None
    ledger.complete(source, result_of(source))
    assert ledger.job(job_id).state is JobState.preparing
    for stage in (Stage.preprocessing, Stage.training):
        finish_stage(ledger, stage)
    assert ledger.job(job_id).state is JobState.succeeded


def test_a_sibling_that_fails_meanwhile_waits_too(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    _validated(ledger, make_spec())
    reader, sibling = claim(Stage.preprocessing), claim(Stage.preprocessing)
    assert reader is not None
    assert sibling is not None
    ledger.rebuild(reader, GONE, ERROR)
    ledger.fail(sibling, Unavailable("away"), retry_seconds=0.0)
    assert claim(Stage.preprocessing) is None
    assert finish_stage(ledger, Stage.validation) == 1
    assert finish_stage(ledger, Stage.preprocessing) == 3


def test_two_that_find_it_have_it_done_again_once(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _validated(ledger, make_spec())
    held = [claim(Stage.preprocessing), claim(Stage.preprocessing)]
    for each in held:
        assert each is not None
        assert ledger.rebuild(each, GONE, ERROR) is not None
    assert finish_stage(ledger, Stage.validation) == 1
    again = [e for e in ledger.events(job_id)[0] if "is done again" in e.message]
    assert len(again) == 1


def test_a_close_step_that_is_done_again_plans_nothing_twice(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec())
    finish_stage(ledger, Stage.validation)
    finish_stage(ledger, Stage.preprocessing)
    (close,) = [o for o in ledger.outputs(job.id) if (o.stage, o.step) == (
        Stage.validation, Step.close)]  # fmt: skip
    reader = claim(Stage.training)
    assert reader is not None
    assert close.artifact is not None
    before = len(ledger.runs(job.id))
    ledger.rebuild(reader, close.artifact.path, ERROR)
    assert finish_stage(ledger, Stage.validation) == 1
    assert len(ledger.runs(job.id)) == before
    assert finish_stage(ledger, Stage.training) == 1
    assert ledger.job(job.id).state is JobState.succeeded


def test_a_paused_job_stays_so(ledger: Ledger, make_spec: Spec, claim: Take) -> None:
    job_id = _validated(ledger, make_spec())
    reader = claim(Stage.preprocessing)
    assert reader is not None
    ledger.pause(job_id)
    ledger.rebuild(reader, GONE, ERROR)
    assert ledger.job(job_id).state is JobState.paused
    assert claim(Stage.validation) is None
    assert claim(Stage.preprocessing) is None
    ledger.resume(job_id)
    assert finish_stage(ledger, Stage.validation) == 1


def test_the_last_attempt_and_a_lost_one_change_nothing(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job_id = _validated(ledger, make_spec())
    reader = claim(Stage.preprocessing)
    for _ in range(2):
        assert reader is not None
        ledger.fail(reader, OperatorError("ours"), retry_seconds=0.0)
        lost, reader = reader, _claim_shard(claim, reader.task.shard)
    assert reader is not None
    with pytest.raises(Fenced):
        ledger.rebuild(lost, GONE, ERROR)
    assert ledger.rebuild(reader, GONE, ERROR) is None
    assert {run.state for run in ledger.runs(job_id) if run.stage is Stage.validation} == {
        RunState.done
    }


def _claim_shard(claim: Take, shard: int) -> Claim:
    while (held := claim(Stage.preprocessing)) is not None:
        if held.task.shard == shard:
            return held
    raise AssertionError(f"shard {shard} is not ready")
