"""/v1/fine_tuning/jobs/{id}: what the job left behind."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import StreamingResponse

from llamahome.gateway.context import Serving, Tenant
from llamahome.gateway.objects import ArtifactObject, Listing
from llamahome.gateway.streaming import download, json_lines
from llamahome.schemas import JobReport

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["results"])


@router.get("/artifacts")
def list_artifacts(services: Serving, tenant: Tenant, job_id: str) -> Listing[ArtifactObject]:
    """The adapter's files."""
    return services.results.artifacts(tenant, job_id)


@router.get("/artifacts/{name:path}", response_class=StreamingResponse)
def get_artifact(services: Serving, tenant: Tenant, job_id: str, name: str) -> StreamingResponse:
    """One file of the adapter; its sha256 is in the header x-content-sha256."""
    entry, content = services.results.artifact(tenant, job_id, name)
    filename = name.rpartition("/")[2]
    return download(content, size=entry.bytes, sha256=entry.sha256, filename=filename)


@router.get("/report")
def get_report(services: Serving, tenant: Tenant, job_id: str) -> JobReport:
    """What the job proves about its work."""
    return services.results.report(tenant, job_id)


@router.get("/quarantine", response_class=StreamingResponse)
def get_quarantine(services: Serving, tenant: Tenant, job_id: str) -> StreamingResponse:
    """The rows that could not be used, one JSON object a line: file, line, code, reason."""
    return json_lines(services.results.quarantine(tenant, job_id))
