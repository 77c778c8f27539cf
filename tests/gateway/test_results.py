"""Models, adapters, reports and quarantines: what jobs leave behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from llamahome.gateway import GatewayDeps
from llamahome.ledger import Claim
from llamahome.schemas import JobReport, JobState

Drive = Callable[[str, JobState], Claim | None]
Submit = Callable[..., str]


@pytest.fixture
def get(url: str, key: str, http: httpx2.Client) -> Callable[[str], httpx2.Response]:
    def do(path: str) -> httpx2.Response:
        return http.get(f"{url}/v1{path}", headers={"authorization": f"Bearer {key}"})

    return do


@pytest.fixture
def done(submit: Submit, drive: Drive) -> str:
    """The id of a job that succeeded."""
    job_id = submit(suffix="bot")
    drive(job_id, JobState.succeeded)
    return job_id


def test_models_are_the_bases_and_the_tenants_own(
    strict: openai.OpenAI, stranger: openai.OpenAI, done: str, submit: Submit
) -> None:
    submit()  # not finished, so no model yet
    name = f"ft:tiny:acme:bot:{done.removeprefix('ftjob-')}"
    assert [model.id for model in strict.models.list()] == ["tiny", name]
    model = strict.models.retrieve(name)
    assert model.owned_by == "acme"
    assert model.parent == "tiny"  # type: ignore[attr-defined]
    assert strict.models.retrieve("tiny").id == "tiny"

    assert [model.id for model in stranger.models.list()] == ["tiny"]
    for other in (name, name.replace("acme", "rival"), name.replace("bot", "bat")):
        with pytest.raises(openai.NotFoundError):
            stranger.models.retrieve(other)


def test_the_adapter_is_downloaded_with_its_digest(
    get: Callable[[str], httpx2.Response], done: str
) -> None:
    listed = get(f"/fine_tuning/jobs/{done}/artifacts").json()["data"]
    assert [file["name"] for file in listed] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in listed:
        answer = get(f"/fine_tuning/jobs/{done}/artifacts/{file['name']}")
        digest = hashlib.sha256(answer.content).hexdigest()
        assert digest == file["sha256"] == answer.headers["x-content-sha256"]
        assert len(answer.content) == file["bytes"]


@pytest.mark.parametrize(
    "name", ["nonesuch", "MANIFEST.json", "../MANIFEST.json", "%2e%2e/MANIFEST.json", "/etc/passwd"]
)
def test_only_the_adapters_own_files_are_served(
    get: Callable[[str], httpx2.Response], done: str, name: str
) -> None:
    answer = get(f"/fine_tuning/jobs/{done}/artifacts/{name}")
    assert answer.status_code == 404


def test_there_is_no_adapter_and_no_report_before_the_end(
    get: Callable[[str], httpx2.Response], submit: Submit
) -> None:
    job_id = submit()
    for tail in ("artifacts", "artifacts/adapter_config.json", "report"):
        answer = get(f"/fine_tuning/jobs/{job_id}/{tail}")
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_job_state"


def test_the_report_is_the_jobs_own(get: Callable[[str], httpx2.Response], done: str) -> None:
    report = JobReport.model_validate(get(f"/fine_tuning/jobs/{done}/report").json())
    assert report.job_id == done
    assert report.training.trained_tokens == 345


def test_the_quarantine_has_the_rejected_rows_as_soon_as_a_shard_is_done(
    get: Callable[[str], httpx2.Response], submit: Submit, drive: Drive
) -> None:
    job_id = submit()
    assert get(f"/fine_tuning/jobs/{job_id}/quarantine").content == b""
    drive(job_id, JobState.preparing)
    answer = get(f"/fine_tuning/jobs/{job_id}/quarantine")
    assert answer.headers["content-type"] == "application/x-ndjson"
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert [(row["line"], row["code"]) for row in rows] == [(3, "bad_json")]


def test_a_file_in_several_shards_has_lines_counted_from_its_start(
    get: Callable[[str], httpx2.Response], deps: GatewayDeps, submit: Submit, drive: Drive
) -> None:
    spec = deps.ledger.job(submit()).spec
    deps.ledger.cancel(deps.ledger.jobs(None)[0][0].id)
    cut = spec.model_copy(update={"shard_bytes": -(-spec.training_files[0].bytes // 2)})
    job, _ = deps.ledger.submit(cut)
    drive(job.id, JobState.preparing)
    rows = get(f"/fine_tuning/jobs/{job.id}/quarantine").text.splitlines()
    assert [json.loads(row)["line"] for row in rows] == [3, 13]


def test_workers_are_those_of_the_ledger(
    get: Callable[[str], httpx2.Response], deps: GatewayDeps
) -> None:
    deps.ledger.heartbeat(
        "w-1", role="training", host="h", pid=7, state="up", version="0", slots=1,
        metrics_port=None, info={},
    )  # fmt: skip
    listed: list[dict[str, Any]] = get("/fleet/workers").json()["data"]
    assert [(worker["id"], worker["role"]) for worker in listed] == [("w-1", "training")]
