"""The client against its fake: what it sends and hands back, and what it does in trouble."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from llamahome.client import Client, EventInfo, JobInfo
from llamahome.client.fake import FakeServer
from llamahome.errors import (
    InvalidConfig,
    InvalidState,
    LlamaHomeError,
    NotFound,
    QuotaExceeded,
    TransientError,
    Unauthenticated,
    Unavailable,
    UserError,
)
from llamahome.schemas import JobError, JobState


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"messages": []}\n--not a boundary\r\n')
    return path


def test_a_path_is_uploaded_and_a_file_id_is_used_as_it_is(server: FakeServer, rows: Path) -> None:
    with server.client() as client:
        job = client.submit(rows, base="tiny", validation_file=str(rows))
        assert server.uploads[job.training_file] == rows.read_bytes()
        assert job.validation_file in server.uploads
        again = client.submit(job.training_file, base="tiny")
    assert again.training_file == job.training_file
    assert again.id != job.id
    assert len(server.uploads) == 2


def test_a_path_that_does_not_exist_is_named(server: FakeServer, tmp_path: Path) -> None:
    with server.client() as client, pytest.raises(NotFound, match=r"nonesuch\.jsonl"):
        client.submit(tmp_path / "nonesuch.jsonl", base="tiny")
    assert server.jobs == {}


def test_a_submission_whose_answer_is_lost_is_repeated_and_made_once(
    server: FakeServer, rows: Path
) -> None:
    class LosesAnswers(httpx2.BaseTransport):
        """The server takes the request; its answer never arrives, twice."""

        lost = 0

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = server.handle_request(request)
            if request.url.path.endswith("/jobs") and self.lost < 2:
                self.lost += 1
                raise httpx2.ReadError("lost", request=request)
            return answer

    transport = LosesAnswers()
    with Client(server.url, server.key, transport=transport, backoff_seconds=0) as client:
        job = client.submit(rows, base="tiny")
    assert list(server.jobs) == [job.id]
    assert transport.lost == 2


def test_the_same_submission_id_answers_the_same_job(server: FakeServer, rows: Path) -> None:
    with server.client() as client:
        first = client.submit(rows, base="tiny", submission_id="nightly-7")
        assert client.submit(rows, base="tiny", submission_id="nightly-7").id == first.id
        assert client.submit(rows, base="tiny").id != first.id
    assert first.submission_id == "nightly-7"


@pytest.mark.parametrize("status", [None, 500, 502, 503])
def test_reads_are_tried_again_while_the_gateway_is_away(
    server: FakeServer, rows: Path, status: int | None
) -> None:
    with server.client(retries=3) as client:
        job = client.submit(rows, base="tiny")
        server.break_down(times=3, status=status)
        assert client.job(job.id).id == job.id
        server.break_down(times=4, status=status)
        with pytest.raises(Unavailable, match=server.url) as gone:
            client.job(job.id)
    assert gone.value.remedy is not None


def test_a_retried_job_is_not_asked_for_twice(server: FakeServer, rows: Path) -> None:
    """Each retry makes a new job, so a lost answer is told rather than repeated."""
    with server.client() as client:
        job = client.submit(rows, base="tiny")
        server.advance(job.id, JobState.failed)
        server.break_down(status=503)
        with pytest.raises(Unavailable):
            client.retry(job.id)
        assert len(server.jobs) == 1
        assert client.retry(job.id).retry_of == job.id


def test_a_gateway_that_is_not_there_is_unavailable_with_its_url() -> None:
    with Client("http://127.0.0.1:9/v1", "key", retries=0) as client:
        assert client.url == "http://127.0.0.1:9"
        with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9"):
            client.models()


def test_a_page_that_is_not_ours_is_unavailable() -> None:
    def proxy(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, html="<h1>Welcome</h1>")

    with Client("http://proxy", "key", retries=0, transport=httpx2.MockTransport(proxy)) as client:
        with pytest.raises(Unavailable, match="without JSON"):
            client.models()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_value", InvalidConfig),
        (400, "unknown_parameter", InvalidConfig),
        (400, "invalid_job_state", InvalidState),
        (400, "file_not_found", NotFound),
        (401, "invalid_api_key", Unauthenticated),
        (403, None, UserError),
        (404, "fine_tune_not_found", NotFound),
        (409, "idempotency_key_reuse", InvalidConfig),
        (429, "active_jobs_limit_exceeded", QuotaExceeded),
        (500, "internal_error", Unavailable),
    ],
)
def test_error_answers_are_the_error_tree(
    status: int, code: str | None, kind: type[LlamaHomeError]
) -> None:
    def refuse(_request: httpx2.Request) -> httpx2.Response:
        error = {"message": "no. Do that", "type": "x", "param": "field", "code": code}
        return httpx2.Response(status, json={"error": error})

    with Client("http://x", "key", retries=0, transport=httpx2.MockTransport(refuse)) as client:
        with pytest.raises(kind) as refused:
            client.models()
    assert type(refused.value) is kind
    assert refused.value.code == (code or kind.default_code)
    assert "Do that" in str(refused.value)


def test_wait_reports_each_change_and_every_event_once(server: FakeServer, rows: Path) -> None:
    moves: list[Callable[[str], None]] = [
        lambda id: server.advance(id, "running", progress={"done": 1, "total": 9}),
        lambda id: server.tell(id, "Step 2/9", step=2),
        lambda id: None,
        lambda id: server.advance(id, "succeeded"),
    ]
    seen: list[tuple[JobInfo, list[EventInfo]]] = []

    class Steps(httpx2.BaseTransport):
        """The job moves on whenever it is asked about."""

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = server.handle_request(request)
            if request.method == "GET" and request.url.path.endswith(job.id) and moves:
                moves.pop(0)(job.id)
            return answer

    with server.client() as client:
        job = client.submit(rows, base="tiny")
    with Client(server.url, server.key, transport=Steps()) as client:
        done = client.wait(job.id, poll_seconds=0.001, on_update=lambda *a: seen.append(a))
        told = [event.id for _, events in seen for event in events]
        assert told == [event.id for event in client.events(job.id)]
    assert done.state is JobState.succeeded
    assert done.terminal
    states = [update.state for update, _ in seen]
    assert states == [JobState.accepted, JobState.running, JobState.running, JobState.succeeded]
    progress = seen[1][0].progress
    assert progress is not None
    assert (progress.done, progress.total) == (1, 9)


def test_wait_gives_up_after_its_timeout_and_the_job_goes_on(
    server: FakeServer, rows: Path
) -> None:
    with server.client() as client:
        job = client.submit(rows, base="tiny")
        with pytest.raises(TransientError) as late:
            client.wait(job.id, timeout=0.01, poll_seconds=5)
        assert late.value.code == "wait_timeout"
        assert not client.job(job.id).terminal


def test_wait_returns_a_failed_job_with_its_error(server: FakeServer, rows: Path) -> None:
    with server.client() as client:
        job = client.submit(rows, base="tiny")
        server.advance(job.id, "failed", error=JobError(code="nan_loss", message="not finite"))
        failed = client.wait(job.id)
    assert failed.error is not None
    assert failed.error.code == "nan_loss"
    assert failed.fine_tuned_model is None


def test_a_job_id_cannot_name_another_path(server: FakeServer) -> None:
    with server.client() as client, pytest.raises(NotFound):
        client.job("../models")


def test_the_client_needs_pydantic_and_httpx2_only() -> None:
    code = (
        "import sys, llamahome.client, llamahome.client.fake;"
        "heavy = {'celery', 'sqlalchemy', 'fastapi', 'torch', 'structlog', 'yaml', 'numpy'};"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
