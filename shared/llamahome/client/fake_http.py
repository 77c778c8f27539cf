"""The HTTP side of the fake: paths to methods, pages, multipart bodies, the error envelope."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import httpx2

from llamahome.schemas import JsonObject

if TYPE_CHECKING:
    from llamahome.client.fake import FakeServer

Answer: TypeAlias = JsonObject | bytes
_JOBS = "/v1/fine_tuning/jobs"


class Refused(Exception):
    """An error answer on its way out."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> httpx2.Response:
        headers = {"x-request-id": "req_fake"}
        return httpx2.Response(self.status, json={"error": self.error}, headers=headers)


def answer_of(answer: Answer) -> httpx2.Response:
    headers = {"x-request-id": "req_fake"}
    if isinstance(answer, bytes):
        return httpx2.Response(200, content=answer, headers=headers)
    return httpx2.Response(200, json=answer, headers=headers)


def route(server: FakeServer, request: httpx2.Request, body: bytes) -> Answer:
    """The server's answer to a request. Raises Refused."""
    path = request.url.path
    post = request.method == "POST"
    if path == "/v1/files" and post:
        return server.add_file(*_upload(request, body))
    if path.startswith("/v1/files/") and request.method == "DELETE":
        return server.delete_file(path.removeprefix("/v1/files/"))
    if path == "/v1/models":
        return whole(server.models())
    if path == "/v1/fleet/workers":
        return whole([])
    if path == _JOBS and post:
        return server.create(json.loads(body))
    if path == _JOBS:
        jobs = server.all_jobs(request.url.params.get("submission_id"))
        return page(jobs, request, default_limit=20)
    of_job = re.fullmatch(rf"{_JOBS}/([^/]+)(?:/(.+))?", path)
    if of_job is None:
        raise Refused(404, f"Invalid URL ({request.method} {path})", code="unknown_url")
    job_id, rest = of_job.groups()
    if post and rest in ("cancel", "pause", "resume", "retry"):
        return server.move(job_id, rest)
    return _of_job(server, request, job_id, rest or "")


def _of_job(server: FakeServer, request: httpx2.Request, job_id: str, rest: str) -> Answer:
    if rest == "":
        return server.get(job_id)
    if rest == "events":
        events = server.events(job_id)
        oldest_first = request.url.params.get("order") == "asc"
        ordered = events if oldest_first else list(reversed(events))
        return page(ordered, request, default_limit=20)
    if rest == "runs":
        server.get(job_id)
        return whole([])
    if rest == "report":
        return server.report(job_id)
    if rest == "quarantine":
        return "".join(json.dumps(row) + "\n" for row in server.quarantine(job_id)).encode()
    if rest == "artifacts":
        return whole(server.artifacts(job_id))
    if rest.startswith("artifacts/"):
        return server.artifact(job_id, rest.removeprefix("artifacts/"))
    raise Refused(404, f"Invalid URL (GET {request.url.path})", code="unknown_url")


def page(items: Sequence[JsonObject], request: httpx2.Request, *, default_limit: int) -> JsonObject:
    limit = int(request.url.params.get("limit", default_limit))
    after = request.url.params.get("after")
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise Refused(400, f"no such item: {after}", code="invalid_cursor", param="after")
        start = ids.index(after) + 1
    found = list(items[start : start + limit])
    return whole(found) | {"has_more": len(items) > start + limit}


def whole(items: Sequence[JsonObject]) -> JsonObject:
    ids = [item.get("id") for item in items]
    return {
        "object": "list", "data": list(items), "has_more": False,
        "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
    }  # fmt: skip


def _upload(request: httpx2.Request, body: bytes) -> tuple[str, str, bytes]:
    """(filename, purpose, content) of a multipart body."""
    boundary = re.search(r"boundary=\"?([^\";]+)", request.headers.get("content-type", ""))
    if boundary is None:
        raise Refused(400, "the body must be multipart/form-data", code="invalid_value")
    filename, parts = "", dict[str, bytes]()
    for part in body.split(b"--" + boundary[1].encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'\bname="([^"]*)"', head)
        named = re.search(rb'filename="([^"]*)"', head)
        filename = named[1].decode() if named else filename
        if name is not None:
            parts[name[1].decode()] = content.removesuffix(b"\r\n")
    for param in ("file", "purpose"):
        if param not in parts:
            message = f"Missing required parameter: {param}"
            raise Refused(400, message, code="missing_required_parameter", param=param)
    return filename, parts["purpose"].decode(), parts["file"]
