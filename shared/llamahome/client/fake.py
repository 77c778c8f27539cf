"""A gateway in memory, for the tests of services that submit jobs: no process, no network.

::

    server = FakeServer()
    with server.client() as client:
        job = client.submit("rows.jsonl", base="tiny")
        server.advance(job.id, "succeeded")
        assert client.wait(job.id).fine_tuned_model

It speaks the gateway's objects and errors but does no work: jobs move when :meth:`advance` says so,
rows and training settings are not checked.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import httpx2

from llamahome.client.client import Client
from llamahome.client.fake_http import Answer, Refused, answer_of, route
from llamahome.errors import InvalidState, NotFound
from llamahome.schemas import JobError, JobState, JsonObject, Stage

_STATUS = {
    JobState.accepted: "validating_files",
    JobState.validating: "validating_files",
    JobState.preparing: "queued",
}
_STAGE = {
    JobState.accepted: Stage.validation,
    JobState.validating: Stage.validation,
    JobState.preparing: Stage.preprocessing,
    JobState.queued: Stage.training,
    JobState.running: Stage.training,
}
T = TypeVar("T")
_ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"not a real adapter"}


class FakeServer(httpx2.BaseTransport):
    """An httpx2 transport that answers as a gateway with one tenant would.

    ``jobs`` and ``uploads`` may be read by tests; ids count up, so they are predictable.
    """

    url = "http://llamahome.fake"

    def __init__(self, *, key: str = "fake-key", bases: Iterable[str] = ("tiny",)) -> None:
        self.key = key
        self.bases = tuple(bases)
        self.jobs: dict[str, JsonObject] = {}
        self.uploads: dict[str, bytes] = {}
        self._files: dict[str, JsonObject] = {}
        self._events: dict[str, list[JsonObject]] = {}
        self._artifacts: dict[str, dict[str, bytes]] = {}
        self._reports: dict[str, JsonObject] = {}
        self._quarantines: dict[str, list[JsonObject]] = {}
        self._outages: list[int | None] = []
        self._numbers = itertools.count(1)

    def client(self, **options: Any) -> Client:
        """A client of this server; its retries do not pause."""
        return Client(self.url, self.key, transport=self, **{"backoff_seconds": 0.0, **options})

    def advance(
        self,
        job_id: str,
        state: JobState | str,
        *,
        error: JobError | None = None,
        progress: JsonObject | None = None,
        artifacts: Mapping[str, bytes] | None = None,
        report: JsonObject | None = None,
        quarantine: Iterable[JsonObject] = (),
    ) -> None:
        """Move a job to ``state`` and write an event.

        ``artifacts`` (name to bytes) and ``report`` are what a succeeded job leaves. Raises
        NotFound, and InvalidState for a job that has ended, as the ledger would.
        """
        state = JobState(state)
        job = self._job(job_id)
        if JobState(job["x_state"]).terminal:
            raise InvalidState(f"job {job_id} has already {job['x_state']}")
        self._set_state(job, state)
        if progress is not None:
            job["x_progress"] = {"total": None, "data": {}, **progress, "stage": _STAGE[state]}
        if state is JobState.failed:
            failure = error or JobError(code="internal_error", message="the test says so")
            job["error"] = failure.model_dump()
        if state is JobState.succeeded:
            job["fine_tuned_model"] = f"ft:{job['model']}:fake::{job_id.removeprefix('ftjob-')}"
            self._artifacts[job_id] = dict(_ADAPTER if artifacts is None else artifacts)
            if report is not None:
                self._reports[job_id] = report
        self._quarantines.setdefault(job_id, []).extend(quarantine)
        self.tell(job_id, f"The job is {state}")

    def tell(self, job_id: str, message: str, **data: Any) -> None:
        """Append an event; with ``step=...`` it is a line of metrics."""
        self._job(job_id)
        self._events[job_id].append(
            {
                "id": f"ftevent-{next(self._numbers)}",
                "object": "fine_tuning.job.event",
                "created_at": int(time.time()),
                "level": "info",
                "message": message,
                "type": "metrics" if "step" in data else "message",
                "data": data,
            }
        )

    def break_down(self, *, times: int = 1, status: int | None = None) -> None:
        """Fail the next ``times`` requests: with an HTTP status, or with no answer at all."""
        self._outages.extend([status] * times)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """httpx2's side of the transport."""
        body = request.read()
        if self._outages:
            status = self._outages.pop(0)
            if status is None:
                raise httpx2.ConnectError("the fake is down", request=request)
            return Refused(status, "the fake is down", code="unavailable").response()
        try:
            if request.headers.get("authorization") != f"Bearer {self.key}":
                raise Refused(401, "Incorrect API key provided", code="invalid_api_key")
            return answer_of(route(self, request, body))
        except Refused as refused:
            return refused.response()

    # What the routes of fake_http call; one method for each answer.

    def add_file(self, filename: str, purpose: str, content: bytes) -> Answer:
        file_id = f"file-{next(self._numbers):024x}"
        self.uploads[file_id] = content
        self._files[file_id] = {
            "id": file_id, "object": "file", "bytes": len(content),
            "created_at": int(time.time()), "filename": filename, "purpose": purpose,
            "status": "processed", "status_details": None, "expires_at": None,
        }  # fmt: skip
        return self._files[file_id]

    def delete_file(self, file_id: str) -> Answer:
        if file_id not in self._files:
            raise Refused(404, f"No such File object: {file_id}", code="file_not_found", param="id")
        del self._files[file_id], self.uploads[file_id]
        return {"id": file_id, "object": "file", "deleted": True}

    def create(self, body: JsonObject) -> Answer:
        submission_id = body.get("submission_id")
        if submission_id is not None:
            for job in self.jobs.values():
                if job["x_submission_id"] == submission_id:
                    return job
        if body.get("model") not in self.bases:
            message = f"Model {body.get('model')} is not available for fine-tuning"
            raise Refused(400, message, code="model_not_found", param="model")
        for param in ("training_file", "validation_file"):
            file_id = body.get(param)
            if file_id not in self._files and (param == "training_file" or file_id is not None):
                message = f"No such File object: {file_id}"
                raise Refused(400, message, code="file_not_found", param=param)
        job = self._new_job(body)
        self.jobs[job["id"]] = job
        self._events[job["id"]] = []
        self.tell(job["id"], f"Created fine-tuning job: {job['id']}")
        return job

    def get(self, job_id: str) -> Answer:
        try:
            return self._job(job_id)
        except NotFound as error:
            raise Refused(404, error.message, code=error.code, param="fine_tune_id") from None

    def move(self, job_id: str, verb: str) -> Answer:
        self.get(job_id)
        job = self.jobs[job_id]
        state = JobState(job["x_state"])
        if verb == "retry":
            if not state.terminal:
                raise Refused(400, f"job {job_id} is {state}", code="invalid_job_state")
            again = self._new_job({**job, "config": job["x_config"], "submission_id": None})
            again["x_retry_of"] = job_id
            self.jobs[again["id"]] = again
            self._events[again["id"]] = []
            return again
        if verb == "cancel" and state is JobState.cancelled:
            return job
        if state.terminal:
            raise Refused(400, f"job {job_id} has already {state}", code="invalid_job_state")
        target = {"cancel": JobState.cancelled, "pause": JobState.paused}.get(verb, JobState.queued)
        if verb == "resume" and state is not JobState.paused:
            return job
        if target is not state:
            self.advance(job_id, target)
        return job

    def all_jobs(self, submission_id: str | None) -> list[JsonObject]:
        newest_first = list(reversed(self.jobs.values()))
        if submission_id is None:
            return newest_first
        return [job for job in newest_first if job["x_submission_id"] == submission_id]

    def events(self, job_id: str) -> list[JsonObject]:
        self.get(job_id)
        return self._events[job_id]

    def models(self) -> list[JsonObject]:
        rows = [(base, "llamahome", None) for base in self.bases]
        for job in self.jobs.values():
            if job["fine_tuned_model"]:
                rows.append((job["fine_tuned_model"], "fake", job["model"]))
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": owner, "parent": parent}
            for name, owner, parent in rows
        ]

    def artifacts(self, job_id: str) -> list[JsonObject]:
        return [
            {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(self._made(self._artifacts, job_id).items())
        ]

    def artifact(self, job_id: str, name: str) -> Answer:
        files = self._made(self._artifacts, job_id)
        if name not in files:
            raise Refused(404, f"{job_id} has no file {name!r}", code="artifact_not_found")
        return files[name]

    def report(self, job_id: str) -> Answer:
        return self._made(self._reports, job_id)

    def quarantine(self, job_id: str) -> list[JsonObject]:
        self.get(job_id)
        return self._quarantines.get(job_id, [])

    def _made(self, things: Mapping[str, T], job_id: str) -> T:
        self.get(job_id)
        if job_id not in things:
            message = f"job {job_id} is {self.jobs[job_id]['x_state']}"
            raise Refused(400, message, code="invalid_job_state", param="fine_tune_id")
        return things[job_id]

    def _job(self, job_id: str) -> JsonObject:
        if job_id not in self.jobs:
            raise NotFound(f"Could not find fine tune: {job_id}", code="fine_tune_not_found")
        return self.jobs[job_id]

    def _set_state(self, job: JsonObject, state: JobState) -> None:
        now = int(time.time())
        job["x_state"] = str(state)
        job["status"] = _STATUS.get(state, str(state))
        job["x_stage"] = _STAGE.get(state)
        job["x_progress"] = None
        job["queue_position"] = 1 if state is JobState.queued else None
        job["attempt"] = 1 if state is JobState.running else job["attempt"]
        if job["x_started_at"] is None and state not in (JobState.accepted, JobState.cancelled):
            job["x_started_at"] = now
        if state.terminal:
            job["finished_at"] = now

    def _new_job(self, body: JsonObject) -> JsonObject:
        hyperparameters = body.get("hyperparameters") or {}
        job: JsonObject = {
            "id": f"ftjob-{next(self._numbers):024x}",
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "finished_at": None,
            "model": body["model"],
            "fine_tuned_model": None,
            "organization_id": "fake",
            "training_file": body["training_file"],
            "validation_file": body.get("validation_file"),
            "result_files": [],
            "trained_tokens": None,
            "error": None,
            "hyperparameters": hyperparameters,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "seed": body.get("seed") or 42,
            "estimated_finish": None,
            "integrations": [],
            "metadata": body.get("metadata"),
            "user_provided_suffix": body.get("suffix"),
            "attempt": None,
            "x_config": body.get("config") or {},
            "x_submission_id": body.get("submission_id"),
            "x_retry_of": None,
            "x_started_at": None,
        }
        self._set_state(job, JobState.accepted)
        return job
