"""/v1/fine_tuning/jobs: create, look up, move."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from llamahome.gateway import names
from llamahome.gateway.context import IdempotencyKey, RawBody, Retries, Serving, Tenant
from llamahome.gateway.creation import Attempt
from llamahome.gateway.objects import CheckpointObject, EventObject, JobObject, Listing
from llamahome.gateway.paging import metadata_filter
from llamahome.gateway.requests import CreateJob
from llamahome.schemas import Run

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Limit = Query(ge=1, le=1000)


@router.post("")
def create_job(
    services: Serving,
    tenant: Tenant,
    body: CreateJob,
    raw: RawBody,
    retries: Retries,
    idempotency_key: IdempotencyKey,
    response: Response,
) -> JobObject:
    """Accept a job. Once this has answered, the job is durable."""
    attempt = Attempt(tenant, body, raw, idempotency_key, retries)
    job, replayed = services.creation.create(attempt)
    if replayed:
        response.headers[names.REPLAYED_HEADER] = "true"
    return services.jobs.shown(job)


@router.get("")
def list_jobs(
    services: Serving,
    tenant: Tenant,
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Limit] = 20,
    metadata: Annotated[
        Literal["null"] | None,
        Query(description="null: jobs without metadata; metadata[k]=v filters"),
    ] = None,
    submission_id: str | None = None,
) -> Listing[JobObject]:
    """The tenant's jobs, newest first."""
    return services.jobs.page(
        tenant, after=after, limit=limit, metadata=metadata_filter(request),
        without_metadata=metadata == "null", submission_id=submission_id,
    )  # fmt: skip


@router.get("/{job_id}")
def get_job(services: Serving, tenant: Tenant, job_id: str) -> JobObject:
    """One job, with its progress."""
    return services.jobs.get(tenant, job_id)


@router.post("/{job_id}/cancel")
def cancel_job(services: Serving, tenant: Tenant, job_id: str) -> JobObject:
    """End the job."""
    return services.jobs.cancel(tenant, job_id)


@router.post("/{job_id}/pause")
def pause_job(services: Serving, tenant: Tenant, job_id: str) -> JobObject:
    """Hold the job; a training saves a checkpoint first."""
    return services.jobs.pause(tenant, job_id)


@router.post("/{job_id}/resume")
def resume_job(services: Serving, tenant: Tenant, job_id: str) -> JobObject:
    """Let a paused job go on."""
    return services.jobs.resume(tenant, job_id)


@router.post("/{job_id}/retry")
def retry_job(services: Serving, tenant: Tenant, job_id: str) -> JobObject:
    """A new job with the same spec; what the old one finished is reused."""
    return services.jobs.retry(tenant, job_id)


@router.get("/{job_id}/runs")
def list_runs(services: Serving, tenant: Tenant, job_id: str) -> Listing[Run]:
    """The job's runs in pipeline order, with their attempts."""
    return services.jobs.runs(tenant, job_id)


@router.get("/{job_id}/events")
def list_events(
    services: Serving,
    tenant: Tenant,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Limit] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Listing[EventObject]:
    """The job's story, newest first unless asked otherwise."""
    return services.jobs.events(tenant, job_id, after=after, limit=limit, order=order)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    services: Serving,
    tenant: Tenant,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Limit] = 10,
) -> Listing[CheckpointObject]:
    """The accepted checkpoints, newest first."""
    return services.jobs.checkpoints(tenant, job_id, after=after, limit=limit)
