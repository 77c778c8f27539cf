"""A kept artifact whose bytes changed is made again, and costs no job that shares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llamahome.config import Settings
from llamahome.errors import DamagedArtifact
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import FaultyBell
from llamahome.queueing.runner import StageRunner
from llamahome.schemas import (
    AttemptOutcome,
    JobSpec,
    JobState,
    Ports,
    RunState,
    Stage,
    StageResult,
    StageTask,
    Step,
)
from support.stages import CountingStage

MakeRunner = Callable[..., StageRunner]
MakeSpec = Callable[..., JobSpec]

EVERY = [
    (Stage.validation, Step.shard),
    (Stage.validation, Step.close),
    (Stage.preprocessing, Step.shard),
    (Stage.preprocessing, Step.close),
]


class ReadingStage(CountingStage):
    """Reads what every run before it left, as far as ``reads`` says."""

    def __init__(self, reads: Callable[[StageTask], bool] = lambda task: True) -> None:
        super().__init__()
        self.reads = reads

    def run(self, task: StageTask, ports: Ports) -> StageResult:
        if self.reads(task):
            for output in task.inputs:
                assert output.artifact is not None
                ports.folder(output.artifact)
        return super().run(task, ports)


@pytest.fixture
def stage() -> ReadingStage:
    return ReadingStage()


@pytest.fixture
def damage(ledger: Ledger, settings: Settings) -> Callable[..., Path]:
    """Changes a byte in what a run of a job left."""

    def do(job_id: str, stage: Stage, step: Step) -> Path:
        output = next(o for o in ledger.outputs(job_id) if (o.stage, o.step) == (stage, step))
        assert output.artifact is not None
        assert settings.state is not None
        file = settings.state / "storage" / output.artifact.path / "shard.txt"
        file.chmod(0o644)
        file.write_bytes(b"X" + file.read_bytes()[1:])
        return file

    return do


def _finish(ledger: Ledger, make_runner: MakeRunner, job_id: str) -> None:
    """Work all stages off until the job has ended; a retry's pause is waited for."""
    for _ in range(40):
        for each in Stage:
            make_runner(each).work()
        if ledger.job(job_id).state.terminal:
            return
    raise AssertionError(f"{job_id} is {ledger.job(job_id).state}")


@pytest.mark.parametrize(("source", "step"), EVERY)
def test_a_damaged_artifact_is_made_again_by_the_job_that_meets_it(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    stage: ReadingStage,
    damage: Callable[..., Path],
    source: Stage,
    step: Step,
) -> None:
    first, _ = ledger.submit(make_spec())
    _finish(ledger, make_runner, first.id)
    file = damage(first.id, source, step)

    second, _ = ledger.submit(make_spec())
    _finish(ledger, make_runner, second.id)

    assert ledger.job(second.id).state is JobState.succeeded
    assert file.read_text() == f"{source} {step} 0"
    again = f"{source}/{step}/0"
    assert stage.executed[again] == 2
    others = [n for place, n in stage.executed.items() if place not in (again, "training/train/0")]
    assert set(others) == {1}, "nothing else is done twice"
    (training,) = [run for run in ledger.runs(second.id) if run.stage is Stage.training]
    assert [a.outcome for a in training.attempts] == [
        AttemptOutcome.retried, AttemptOutcome.succeeded,
    ]  # fmt: skip
    messages = [event.message for event in ledger.events(second.id)[0]]
    assert any(f"{source} {step} 0 is done again" in message for message in messages)


@pytest.mark.parametrize(("source", "step"), EVERY)
def test_so_does_the_job_that_made_it(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    damage: Callable[..., Path],
    source: Stage,
    step: Step,
) -> None:
    job, _ = ledger.submit(make_spec(shards=2))
    for each in (Stage.validation, Stage.preprocessing):
        make_runner(each).work()
    damage(job.id, source, step)
    _finish(ledger, make_runner, job.id)
    assert ledger.job(job.id).state is JobState.succeeded
    assert {run.state for run in ledger.runs(job.id)} == {RunState.done}


def test_an_artifact_that_is_gone_is_made_again(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    damage: Callable[..., Path],
) -> None:
    job, _ = ledger.submit(make_spec())
    for each in (Stage.validation, Stage.preprocessing):
        make_runner(each).work()
    folder = damage(job.id, Stage.preprocessing, Step.close).parent
    folder.rename(folder.with_name("elsewhere"))
    _finish(ledger, make_runner, job.id)
    assert ledger.job(job.id).state is JobState.succeeded


def test_another_tenants_job_with_the_same_data_is_not_harmed(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    damage: Callable[..., Path],
) -> None:
    for tenant in ("acme", "rival"):
        job, _ = ledger.submit(make_spec(tenant=tenant))
        _finish(ledger, make_runner, job.id)
    damage(job.id, Stage.preprocessing, Step.close)
    for tenant in ("acme", "rival"):
        job, _ = ledger.submit(make_spec(tenant=tenant))
        _finish(ledger, make_runner, job.id)
        assert ledger.job(job.id).state is JobState.succeeded


def test_a_disk_that_damages_whatever_it_is_given_fails_the_job_in_the_end(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    stage: ReadingStage,
    settings: Settings,
) -> None:
    """The reading run's own attempts are the bound: no loop between it and its source."""
    job, _ = ledger.submit(make_spec())
    assert settings.state is not None
    root = settings.state / "storage"

    def damaging(task: StageTask, ports: Ports) -> StageResult:
        result = stage.run(task, ports)
        assert result.artifact is not None
        file = root / result.artifact.path / "shard.txt"
        file.chmod(0o644)
        file.write_text("rot")
        return result

    for _ in range(20):
        make_runner(Stage.validation).work()
        make_runner(Stage.preprocessing, function=damaging).work()
        make_runner(Stage.training).work()
    done = ledger.job(job.id)
    assert done.state is JobState.failed
    assert done.error is not None
    assert "corrupt_artifact" in done.error.message
    assert stage.executed["preprocessing/shard/0"] == 3


def test_what_is_no_output_of_the_job_cannot_be_made_again(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec
) -> None:
    """An earlier job's adapter, say: only its owner could train it again."""
    job, _ = ledger.submit(make_spec())

    def function(task: StageTask, ports: Ports) -> StageResult:
        raise DamagedArtifact("changed", file="models/ftjob-other/f1")

    make_runner(function=function).work()
    (run, *_rest) = ledger.runs(job.id)
    assert run.state is RunState.ready
    assert run.attempts[0].outcome is AttemptOutcome.retried


def test_whoever_can_make_it_again_is_rung_for(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, damage: Callable[..., Path]
) -> None:
    job, _ = ledger.submit(make_spec())
    for each in (Stage.validation, Stage.preprocessing):
        make_runner(each).work()
    damage(job.id, Stage.validation, Step.shard)
    rung: list[Stage] = []
    bell = FaultyBell(lambda stage, recover: rung.append(stage), drop_share=0, double_share=0)
    make_runner(Stage.training, bell=bell).work()
    assert rung == [Stage.validation]
    assert ledger.job(job.id).state is JobState.validating
