"""Jobs through the stock client: created, watched, listed, moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from openai.types.fine_tuning import FineTuningJobEvent

from llamahome.errors import InvalidData
from llamahome.gateway import GatewayDeps
from llamahome.ledger import Claim
from llamahome.schemas import ArtifactRef, CheckpointRef, JobState, NewEvent

Drive = Callable[[str, JobState], Claim | None]
Submit = Callable[..., str]

STATUS = {
    JobState.accepted: "validating_files",
    JobState.validating: "validating_files",
    JobState.preparing: "queued",
    JobState.queued: "queued",
    JobState.running: "running",
    JobState.succeeded: "succeeded",
}


def test_a_job_is_strictly_valid_in_each_state_on_its_way(
    strict: openai.OpenAI, submit: Submit, drive: Drive
) -> None:
    job_id = submit(suffix="bot", metadata={"team": "support"})
    for state, status in STATUS.items():
        drive(job_id, state)
        job = strict.fine_tuning.jobs.retrieve(job_id)
        assert job.status == status
        assert job.x_state == state  # type: ignore[attr-defined]
    assert job.fine_tuned_model == f"ft:tiny:acme:bot:{job_id.removeprefix('ftjob-')}"
    assert job.trained_tokens == 345
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.metadata == {"team": "support"}
    assert job.organization_id == "acme"
    assert job.error is None


def test_a_failed_and_a_cancelled_job_are_strictly_valid_too(
    strict: openai.OpenAI, submit: Submit, drive: Drive, deps: GatewayDeps
) -> None:
    job_id = submit()
    claim = drive(job_id, JobState.validating)
    assert claim is not None
    few = InvalidData(
        "has 3 examples, but must have at least 10", code="invalid_n_examples",
        field="training_file",
    )  # fmt: skip
    deps.ledger.fail(claim, few)
    failed = strict.fine_tuning.jobs.retrieve(job_id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_n_examples", "training_file")
    assert failed.fine_tuned_model is None
    assert failed.x_stage == "validation"  # type: ignore[attr-defined]

    cancelled = strict.fine_tuning.jobs.cancel(submit())
    assert cancelled.status == "cancelled"


def test_a_submission_that_was_rejected_is_shown_as_a_failed_job(
    strict: openai.OpenAI, deps: GatewayDeps
) -> None:
    from llamahome.queueing.admission import Wanted

    wanted = Wanted(model="nonesuch", training_file="file-nonesuch")
    error = InvalidData("no such file", code="file_not_found", field="training_file")
    job = deps.admission.reject("acme", wanted, error, kind="celery", submission_id="s-1")
    shown = strict.fine_tuning.jobs.retrieve(job.id)
    assert shown.status == "failed"
    assert shown.error is not None
    assert shown.error.code == "file_not_found"


def test_hyperparameters_are_the_effective_ones_and_come_back(
    stock: openai.OpenAI, upload: Callable[[], str], deps: GatewayDeps
) -> None:
    job = stock.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(),
        seed=7,
        method={  # type: ignore[arg-type]
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.1,
                    "lora_r": 16, "lora_alpha": 64, "lora_dropout": 0, "target_modules": ["o_proj"],
                }
            },
        },
        extra_body={"config": {"max_length": 128, "lora": {"use_rslora": True}}},
    )  # fmt: skip
    usual = 5e-5
    config = deps.ledger.job(job.id).spec.config
    assert config["epochs"] == 2
    assert config["learning_rate"] == pytest.approx(usual * 0.1)
    assert (config["seed"], config["max_length"], config["batch_size"]) == (7, 128, 4)
    assert config["lora"] == {
        "r": 16, "alpha": 64.0, "dropout": 0.0, "target_modules": ["o_proj"], "bias": "none",
        "use_rslora": True, "merge": False,
    }  # fmt: skip
    assert job.seed == 7
    assert job.method is not None
    assert job.method.supervised is not None
    shown = job.method.supervised.hyperparameters
    assert shown is not None
    assert (shown.n_epochs, shown.batch_size, shown.learning_rate_multiplier) == (2, 4, 0.1)
    assert shown.lora_r == 16  # type: ignore[attr-defined]
    assert job.hyperparameters.n_epochs == 2
    assert job.x_config == config  # type: ignore[attr-defined]


def test_the_gateway_asks_for_ten_clean_examples_unless_told_otherwise(
    submit: Submit, deps: GatewayDeps
) -> None:
    usual = deps.ledger.job(submit()).spec
    assert (usual.min_examples, usual.config["max_invalid_share"]) == (10, 0.0)
    lenient = deps.ledger.job(submit(extra_body={"config": {"max_invalid_share": 0.2}})).spec
    assert lenient.config["max_invalid_share"] == 0.2


def test_null_parameters_are_the_same_as_none(
    url: str, key: str, http: httpx2.Client, upload: Callable[[], str]
) -> None:
    body = {
        "model": "tiny", "training_file": upload(), "validation_file": None, "suffix": None,
        "seed": None, "metadata": None, "integrations": None, "method": None,
        "hyperparameters": None, "config": None, "recipe": None, "submission_id": None,
    }  # fmt: skip
    headers = {"authorization": f"Bearer {key}"}
    answer = http.post(f"{url}/v1/fine_tuning/jobs", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["metadata"] is None
    assert answer.json()["seed"] == 42


def test_all_pages_of_jobs_are_walked_newest_first(stock: openai.OpenAI, submit: Submit) -> None:
    made = [submit() for _ in range(5)]
    assert [job.id for job in stock.fine_tuning.jobs.list(limit=2)] == made[::-1]
    # A job that is created meanwhile neither repeats nor hides another.
    first = stock.fine_tuning.jobs.list(limit=2)
    submit()
    assert [job.id for job in first.get_next_page().data] == [made[2], made[1]]


def test_jobs_are_filtered_by_metadata_and_submission_id(
    stock: openai.OpenAI, submit: Submit
) -> None:
    red = submit(metadata={"team": "red", "env": "prod"})
    submit(metadata={"team": "blue"})
    bare = submit(extra_body={"submission_id": "nightly-1"})
    assert [job.id for job in stock.fine_tuning.jobs.list(metadata={"team": "red"})] == [red]
    nothing = stock.fine_tuning.jobs.list(metadata={"team": "red", "env": "dev"})
    assert list(nothing) == []
    without = stock.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in without] == [bare]
    named = stock.fine_tuning.jobs.list(extra_query={"submission_id": "nightly-1"})
    assert [job.id for job in named] == [bare]
    assert named.data[0].x_submission_id == "nightly-1"  # type: ignore[attr-defined]


def test_events_are_paged_newest_first(
    strict: openai.OpenAI, submit: Submit, drive: Drive, deps: GatewayDeps
) -> None:
    job_id = submit()
    claim = drive(job_id, JobState.running)
    assert claim is not None
    steps = [
        NewEvent(
            message=f"Step {n}/9", kind="metrics",
            data={"step": n, "train_loss": None if n == 1 else 0.5, "total_steps": 9},
        )
        for n in (1, 2)
    ]  # fmt: skip
    deps.ledger.renew(claim, events=steps)
    drive(job_id, JobState.running)

    found = list(strict.fine_tuning.jobs.list_events(job_id, limit=2))
    assert found == list(strict.fine_tuning.jobs.list_events(job_id))
    assert found[-1].message == f"Created fine-tuning job: {job_id}"
    assert [event.type for event in found[:2]] == ["metrics", "metrics"]
    assert found[0].data == {"step": 2, "train_loss": 0.5, "total_steps": 9}
    assert all(event.id.startswith("ftevent-") for event in found)

    oldest_first = strict.get(
        f"/fine_tuning/jobs/{job_id}/events?order=asc&limit=100",
        cast_to=httpx2.Response,
    ).json()
    ids = [FineTuningJobEvent.model_validate(item).id for item in oldest_first["data"]]
    assert ids == [event.id for event in reversed(found)]


def test_checkpoints_are_listed_newest_first(
    strict: openai.OpenAI, submit: Submit, drive: Drive, deps: GatewayDeps
) -> None:
    job_id = submit()
    claim = drive(job_id, JobState.running)
    assert claim is not None
    for step in (10, 20, 30):
        ref = ArtifactRef(digest=f"{step:064x}"[::-1], path=f"c/{step}", bytes=1)
        deps.ledger.checkpoint(claim, CheckpointRef(step=step, artifact=ref, eval_loss=1 / step))
    found = list(strict.fine_tuning.jobs.checkpoints.list(job_id, limit=2))
    assert [point.step_number for point in found] == [30, 20, 10]
    assert found[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-30")
    assert found[0].metrics.full_valid_loss == pytest.approx(1 / 30)
    assert found[0].fine_tuning_job_id == job_id
    page = strict.fine_tuning.jobs.checkpoints.list(job_id, limit=2)
    assert (page.first_id, page.last_id) == (found[0].id, found[1].id)  # type: ignore[attr-defined]


def test_progress_attempt_and_estimated_finish_are_shown_while_it_trains(
    stock: openai.OpenAI, submit: Submit, drive: Drive, deps: GatewayDeps
) -> None:
    job_id = submit()
    waiting: Any = stock.fine_tuning.jobs.retrieve(job_id)
    assert waiting.x_progress == {"stage": "validation", "done": 0, "total": 1, "data": {}}
    assert waiting.attempt is None
    drive(job_id, JobState.queued)
    assert stock.fine_tuning.jobs.retrieve(job_id).queue_position == 1  # type: ignore[attr-defined]
    claim = drive(job_id, JobState.running)
    assert claim is not None
    for step in (1, 2):
        event = NewEvent(message=f"Step {step}/9", kind="metrics", data={"step": step})
        progress = {"done": step, "total": 9, "data": {"train_loss": 0.5}}
        deps.ledger.renew(claim, events=[event], progress=progress)
    job: Any = stock.fine_tuning.jobs.retrieve(job_id)
    assert job.x_progress["done"] == 2
    assert job.x_progress["data"] == {"train_loss": 0.5}
    assert (job.x_stage, job.attempt, job.queue_position) == ("training", 1, None)
    assert job.estimated_finish >= job.created_at


def test_cancel_is_idempotent_and_refused_for_a_job_that_succeeded(
    stock: openai.OpenAI, submit: Submit, drive: Drive
) -> None:
    job_id = submit()
    assert stock.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    assert stock.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    done = submit()
    drive(done, JobState.succeeded)
    with pytest.raises(openai.BadRequestError) as refused:
        stock.fine_tuning.jobs.cancel(done)
    assert refused.value.code == "invalid_job_state"


def test_pause_and_resume(stock: openai.OpenAI, submit: Submit, drive: Drive) -> None:
    job_id = submit()
    drive(job_id, JobState.queued)
    # The specification has no such status; the default (not strict) client hands it through.
    assert stock.fine_tuning.jobs.pause(job_id).status == "paused"  # type: ignore[comparison-overlap]
    assert stock.fine_tuning.jobs.pause(job_id).status == "paused"  # type: ignore[comparison-overlap]
    resumed = stock.fine_tuning.jobs.resume(job_id)
    assert resumed.status == "queued"
    stock.fine_tuning.jobs.cancel(job_id)
    with pytest.raises(openai.BadRequestError) as refused:
        stock.fine_tuning.jobs.pause(job_id)
    assert refused.value.code == "invalid_job_state"


def test_a_retry_is_a_new_job_that_names_the_old_one(stock: openai.OpenAI, submit: Submit) -> None:
    job_id = submit()
    with pytest.raises(openai.BadRequestError):
        stock.post(f"/fine_tuning/jobs/{job_id}/retry", cast_to=httpx2.Response)
    stock.fine_tuning.jobs.cancel(job_id)
    again = stock.post(f"/fine_tuning/jobs/{job_id}/retry", cast_to=httpx2.Response).json()
    assert again["id"] != job_id
    assert again["x_retry_of"] == job_id
    assert again["status"] == "validating_files"


def test_runs_show_every_attempt(stock: openai.OpenAI, submit: Submit, drive: Drive) -> None:
    job_id = submit()
    drive(job_id, JobState.preparing)
    listed = stock.get(f"/fine_tuning/jobs/{job_id}/runs", cast_to=httpx2.Response).json()
    places = [(run["stage"], run["step"], run["state"]) for run in listed["data"]]
    assert places[:2] == [("validation", "shard", "done"), ("validation", "close", "done")]
    assert listed["data"][0]["attempts"][0]["outcome"] == "succeeded"
    assert json.dumps(listed).count('"ready"') == 1
