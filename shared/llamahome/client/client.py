"""``Client``: jobs as plain calls. Every method raises the tree of ``llamahome.errors``."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from llamahome.client.download import fetch_folder
from llamahome.client.http import Http
from llamahome.client.objects import ArtifactInfo, EventInfo, JobInfo, ModelInfo, StoredFileInfo
from llamahome.errors import (
    InvalidData,
    LlamaHomeError,
    NotFound,
    QuotaExceeded,
    TransientError,
    UserError,
)
from llamahome.schemas import JobReport, JsonObject, Run, Worker

OnUpdate = Callable[[JobInfo, list[EventInfo]], None]

_FILE_ID = re.compile(r"file-[0-9A-Za-z_-]+")
_PAGE = 100
# The gateway answers an upload after the bytes are durable, which may take long on slow storage.
_UPLOAD_READ_SECONDS = 600.0


class Client:
    """A connection to a gateway; use as a context manager, or call :meth:`close`.

    ``url`` may end in ``/v1`` or not. ``timeout`` is seconds for each network operation.
    Safe requests are tried ``retries`` times more, with growing pauses, when the gateway does not
    answer; a submission is safe because it carries an id that the ledger keeps unique.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
        retries: int = 4,
        backoff_seconds: float = 0.25,
    ) -> None:
        self._timeout = timeout
        self._http = Http(
            url, key, timeout=timeout, retries=retries, backoff_seconds=backoff_seconds,
            transport=transport,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def url(self) -> str:
        """The gateway's URL, without ``/v1``."""
        return self._http.url

    def upload(self, path: Path | str, purpose: str = "fine-tune") -> StoredFileInfo:
        """Send a file. Raises NotFound where there is none, InvalidData if empty or too large."""
        source = Path(path)
        if not source.is_file():
            raise NotFound("no such file", code="file_not_found", file=str(source))
        if source.stat().st_size == 0:
            raise InvalidData(
                "the file is empty",
                file=str(source),
                remedy="Write one conversation a line into it",
            )

        def attempt(number: int) -> StoredFileInfo:
            # Opened anew for each try: a broken one has already read from it.
            with source.open("rb") as stream:
                answer = self._http.once(
                    "POST", "/v1/files", number,
                    data={"purpose": purpose},
                    files={"file": (source.name, stream, "application/jsonl")},
                    timeout=httpx2.Timeout(self._timeout, read=_UPLOAD_READ_SECONDS),
                )  # fmt: skip
            return StoredFileInfo.model_validate(answer)

        return self._http.retrying(attempt)

    def submit(
        self,
        training_file: Path | str,
        *,
        base: str,
        validation_file: Path | str | None = None,
        recipe: str | None = None,
        config: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        metadata: Mapping[str, str] | None = None,
        submission_id: str | None = None,
    ) -> JobInfo:
        """Hand over a job; once this returns, the job is durable.

        A path is uploaded, a file id (``file-...``) is used as it is. ``config`` has nested
        training settings. The same ``submission_id`` again answers the first job; without one, a
        fresh id makes this call's own retries safe. Raises InvalidConfig, NotFound, InvalidData,
        QuotaExceeded, Unavailable; what was uploaded for a refused job is deleted again.
        """
        uploaded: list[str] = []
        try:
            return self._submit(
                uploaded,
                training_file,
                validation_file,
                {
                    "model": base,
                    "recipe": recipe,
                    "suffix": suffix,
                    "config": dict(config) if config is not None else None,
                    "metadata": dict(metadata) if metadata is not None else None,
                    "submission_id": submission_id or f"client-{uuid.uuid4().hex}",
                },
            )
        except (UserError, QuotaExceeded) as refused:
            self._take_back(uploaded, refused)
            raise

    def _take_back(self, uploaded: list[str], refused: LlamaHomeError) -> None:
        try:
            for file in uploaded:
                self._http.json("DELETE", f"/v1/files/{file}")
        except LlamaHomeError as error:
            # Why the job was refused matters more; the file can be deleted by hand.
            refused.add_note(f"uploaded files left behind ({', '.join(uploaded)}): {error}")

    def _submit(
        self,
        uploaded: list[str],
        training_file: Path | str,
        validation_file: Path | str | None,
        wishes: JsonObject,
    ) -> JobInfo:
        body = {name: value for name, value in wishes.items() if value is not None}
        body["training_file"] = self._file_id(training_file, uploaded)
        if validation_file is not None:
            body["validation_file"] = self._file_id(validation_file, uploaded)
        return JobInfo.model_validate(self._http.json("POST", "/v1/fine_tuning/jobs", json=body))

    def _file_id(self, file: Path | str, uploaded: list[str]) -> str:
        if isinstance(file, str) and _FILE_ID.fullmatch(file) and not Path(file).exists():
            return file
        uploaded.append(self.upload(file).id)
        return uploaded[-1]

    def job(self, id: str) -> JobInfo:
        """Raises NotFound, for another tenant's job too."""
        return JobInfo.model_validate(self._http.json("GET", _job_path(id)))

    def jobs(
        self, *, limit: int = 20, after: str | None = None, submission_id: str | None = None
    ) -> list[JobInfo]:
        """One page, newest first; ``after`` is the last id of the page before."""
        return self._jobs_page(limit, after, submission_id)[0]

    def iter_jobs(self) -> Iterator[JobInfo]:
        """All jobs of the tenant, newest first, fetched page by page."""
        after: str | None = None
        more = True
        while more:
            page, more = self._jobs_page(_PAGE, after, None)
            yield from page
            after = page[-1].id if page else None
            more = more and bool(page)

    def _jobs_page(
        self, limit: int, after: str | None, submission_id: str | None
    ) -> tuple[list[JobInfo], bool]:
        params = {"limit": limit, "after": after, "submission_id": submission_id}
        given = {name: value for name, value in params.items() if value is not None}
        page = self._http.json("GET", "/v1/fine_tuning/jobs", params=given)
        return [JobInfo.model_validate(item) for item in page["data"]], page["has_more"]

    def runs(self, id: str) -> list[Run]:
        """The job's runs in pipeline order, each with its attempts."""
        return [Run.model_validate(item) for item in self._list(f"{_job_path(id)}/runs")]

    def events(self, id: str, after: str | None = None) -> list[EventInfo]:
        """All events after the event id ``after``, oldest first."""
        found: list[EventInfo] = []
        more = True
        while more:
            params: dict[str, Any] = {"order": "asc", "limit": _PAGE}
            if after is not None:
                params["after"] = after
            page = self._http.json("GET", f"{_job_path(id)}/events", params=params)
            found.extend(EventInfo.model_validate(item) for item in page["data"])
            more = page["has_more"] and bool(page["data"])
            after = found[-1].id if found else after
        return found

    def wait(
        self,
        id: str,
        *,
        timeout: float | None = None,
        poll_seconds: float = 1.0,
        on_update: OnUpdate | None = None,
    ) -> JobInfo:
        """Block until the job has ended, however it ended, and return it.

        ``on_update(job, new events, oldest first)`` is called at first and whenever the job or its
        events changed. Raises TransientError (code ``wait_timeout``) after ``timeout`` seconds;
        the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        seen: JobInfo | None = None
        last_event: str | None = None
        while True:
            job = self.job(id)
            if on_update is not None:
                # Read after the job, so that a terminal job comes with its last events.
                events = self.events(id, after=last_event)
                if events or job != seen:
                    on_update(job, events)
                seen, last_event = job, events[-1].id if events else last_event
            if job.terminal:
                return job
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TransientError(
                    f"job {id} is still {job.state} after {timeout} s", code="wait_timeout",
                    remedy="The job goes on; wait again, or with a longer timeout",
                )  # fmt: skip
            time.sleep(poll_seconds if left is None else min(poll_seconds, left))

    def cancel(self, id: str) -> JobInfo:
        """End the job. Idempotent. Raises InvalidState when it succeeded or failed."""
        return self._act(id, "cancel")

    def pause(self, id: str) -> JobInfo:
        """Hold the job at its next checkpoint. Idempotent. Raises InvalidState when it ended."""
        return self._act(id, "pause")

    def resume(self, id: str) -> JobInfo:
        """Let a paused job go on. Idempotent. Raises InvalidState when it ended."""
        return self._act(id, "resume")

    def retry(self, id: str) -> JobInfo:
        """A new job with the old one's spec, reusing what was finished. Raises InvalidState.

        Not repeated by itself when the answer is lost: ask :meth:`jobs` first.
        """
        return self._act(id, "retry", repeatable=False)

    def _act(self, id: str, verb: str, *, repeatable: bool = True) -> JobInfo:
        answer = self._http.json("POST", f"{_job_path(id)}/{verb}", repeatable=repeatable)
        return JobInfo.model_validate(answer)

    def models(self) -> list[ModelInfo]:
        """The registered bases, and the tenant's fine-tuned models."""
        return [ModelInfo.model_validate(item) for item in self._list("/v1/models")]

    def workers(self) -> list[Worker]:
        """The fleet's processes by their own heartbeats."""
        return [Worker.model_validate(item) for item in self._list("/v1/fleet/workers")]

    def report(self, id: str) -> JobReport:
        """What the job proves about its work. Raises InvalidState until it succeeded."""
        return JobReport.model_validate(self._http.json("GET", f"{_job_path(id)}/report"))

    def quarantine(self, id: str) -> Iterator[JsonObject]:
        """The rows that could not be used, each with file, line, code and reason."""
        return self._http.lines(f"{_job_path(id)}/quarantine")

    def artifacts(self, id: str) -> list[ArtifactInfo]:
        """The files of the adapter. Raises InvalidState until the job succeeded."""
        return [ArtifactInfo.model_validate(i) for i in self._list(f"{_job_path(id)}/artifacts")]

    def fetch(self, id: str, into: Path) -> Path:
        """Download the adapter to the folder ``into`` and return it.

        Each file is checked against its sha256; the folder appears whole or not at all.
        Raises InvalidState (no adapter, or ``into`` is not empty), CorruptArtifact, Unavailable.
        """
        return fetch_folder(self._http, _job_path(id), self.artifacts(id), Path(into))

    def _list(self, path: str) -> list[JsonObject]:
        data: list[JsonObject] = self._http.json("GET", path)["data"]
        return data


def _job_path(id: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_-]+", id):
        raise NotFound(f"{id!r} is no job id", code="fine_tune_not_found")
    return f"/v1/fine_tuning/jobs/{id}"
