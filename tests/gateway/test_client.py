"""Our client, once against the gateway and once against its fake: both must answer alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.client import Client
from llamahome.client.fake import FakeServer
from llamahome.errors import InvalidConfig, InvalidState, NotFound, Unauthenticated
from llamahome.schemas import JobState

REJECTED = {"file": "rows.jsonl", "line": 3, "code": "bad_json", "reason": "no JSON"}


class Side:
    """A server, a client of it, and how a job is moved there."""

    def __init__(self, url: str, client: Client, advance: Callable[[str, JobState], Any]) -> None:
        self.url = url
        self.client = client
        self.advance = advance


@pytest.fixture(params=["fake", "gateway"])
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    if request.param == "fake":
        server = FakeServer()

        def advance(job_id: str, state: JobState) -> None:
            rejected = [REJECTED] if state is JobState.succeeded else []
            server.advance(job_id, state, quarantine=rejected)

        with server.client() as client:
            yield Side(server.url, client, advance)
    else:
        url, key = request.getfixturevalue("url"), request.getfixturevalue("key")
        with Client(url, key, retries=0) as client:
            yield Side(url, client, request.getfixturevalue("drive"))


@pytest.fixture
def file(tmp_path: Path, rows: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows)
    return path


def test_a_job_is_followed_from_submission_to_adapter(
    side: Side, file: Path, tmp_path: Path
) -> None:
    client = side.client
    uploaded = client.upload(file)
    assert (uploaded.filename, uploaded.bytes) == ("rows.jsonl", file.stat().st_size)
    job = client.submit(
        uploaded.id, base="tiny", config={"epochs": 1}, metadata={"team": "red"}, suffix="bot"
    )
    assert (job.state, job.status, job.model) == (JobState.accepted, "validating_files", "tiny")
    assert job.config["epochs"] == 1
    assert job.metadata == {"team": "red"}
    assert not job.terminal

    for state in (JobState.validating, JobState.preparing, JobState.queued, JobState.running):
        side.advance(job.id, state)
        moved = client.job(job.id)
        assert moved.state is state
        assert moved.queue_position == (1 if state is JobState.queued else None)
    assert moved.attempt == 1
    assert moved.started_at is not None

    side.advance(job.id, JobState.succeeded)
    done = client.wait(job.id)
    assert done.finished_at is not None
    assert done.fine_tuned_model is not None
    assert done.fine_tuned_model.startswith("ft:tiny:")
    names = [model.id for model in client.models()]
    assert names == ["tiny", done.fine_tuned_model]
    assert [row["line"] for row in client.quarantine(job.id)] == [3]

    adapter = client.fetch(job.id, tmp_path / "adapter")
    listed = client.artifacts(job.id)
    assert {path.name for path in adapter.iterdir()} == {artifact.name for artifact in listed}


def test_events_come_oldest_first_and_go_on_after_the_last_one(side: Side, file: Path) -> None:
    job = side.client.submit(file, base="tiny")
    first = side.client.events(job.id)
    assert first[0].message == f"Created fine-tuning job: {job.id}"
    side.advance(job.id, JobState.succeeded)
    rest = side.client.events(job.id, after=first[-1].id)
    assert rest
    assert side.client.events(job.id) == first + rest
    assert side.client.events(job.id, after=rest[-1].id) == []


def test_jobs_are_listed_in_pages_and_walked_whole(side: Side, file: Path) -> None:
    made = [side.client.submit(file, base="tiny", submission_id=f"s-{n}").id for n in range(4)]
    assert [job.id for job in side.client.iter_jobs()] == made[::-1]
    assert [job.id for job in side.client.jobs(limit=2)] == [made[3], made[2]]
    assert [job.id for job in side.client.jobs(limit=2, after=made[2])] == [made[1], made[0]]
    assert [job.id for job in side.client.jobs(submission_id="s-1")] == [made[1]]


def test_a_submission_id_names_one_job(side: Side, file: Path) -> None:
    first = side.client.submit(file, base="tiny", submission_id="nightly")
    assert side.client.submit(file, base="tiny", submission_id="nightly").id == first.id
    assert first.submission_id == "nightly"


def test_cancel_pause_resume_and_retry(side: Side, file: Path) -> None:
    job_id = side.client.submit(file, base="tiny").id
    side.advance(job_id, JobState.queued)
    assert side.client.pause(job_id).state is JobState.paused
    assert side.client.pause(job_id).state is JobState.paused
    assert side.client.resume(job_id).state is JobState.queued
    with pytest.raises(InvalidState):
        side.client.retry(job_id)
    assert side.client.cancel(job_id).state is JobState.cancelled
    assert side.client.cancel(job_id).state is JobState.cancelled
    for refused in (side.client.pause, side.client.resume):
        with pytest.raises(InvalidState):
            refused(job_id)
    again = side.client.retry(job_id)
    assert (again.retry_of, again.state) == (job_id, JobState.accepted)


def test_what_is_wrong_is_said_alike(side: Side, file: Path) -> None:
    client = side.client
    job_id = client.submit(file, base="tiny").id
    with pytest.raises(NotFound) as no_job:
        client.job("ftjob-nonesuch")
    assert (no_job.value.code, no_job.value.place.field) == ("fine_tune_not_found", "fine_tune_id")
    with pytest.raises(NotFound) as no_base:
        client.submit(file, base="nonesuch")
    assert (no_base.value.code, no_base.value.place.field) == ("model_not_found", "model")
    with pytest.raises(NotFound) as no_file:
        client.submit("file-nonesuch", base="tiny")
    assert no_file.value.place.field == "training_file"
    for early in (client.artifacts, client.report):
        with pytest.raises(InvalidState):
            early(job_id)
    with pytest.raises(InvalidConfig) as cursor:
        client.jobs(after="ftjob-nonesuch")
    assert cursor.value.code == "invalid_cursor"


def test_the_fakes_job_has_the_fields_of_the_gateways(ours: Client, file: Path) -> None:
    def fields(client: Client) -> set[str]:
        job_id = client.submit(file, base="tiny").id
        return set(client._http.json("GET", f"/v1/fine_tuning/jobs/{job_id}"))

    with FakeServer().client() as client:
        assert fields(client) == fields(ours)


def test_a_wrong_key_is_unauthenticated(url: str) -> None:
    with Client(url, "wrong") as client, pytest.raises(Unauthenticated):
        client.models()


def test_the_report_and_the_runs_are_schemas(
    ours: Client, file: Path, drive: Callable[[str, JobState], Any]
) -> None:
    job_id = ours.submit(file, base="tiny").id
    drive(job_id, JobState.succeeded)
    assert ours.report(job_id).job_id == job_id
    assert [str(run.stage) for run in ours.runs(job_id)] == [
        "validation", "validation", "preprocessing", "preprocessing", "training",
    ]  # fmt: skip
    assert ours.workers() == []
