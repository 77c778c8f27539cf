"""Jobs as the HTTP door shows and moves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.objects import CheckpointObject, EventObject, JobObject, Listing
from llamahome.gateway.paging import event_cursor, listing, page_of, with_cursor_errors
from llamahome.gateway.views import JobViews, checkpoint_object, event_object
from llamahome.schemas import Event, Job, JobState, Run

# Enough of the newest events to tell the pace of a training.
_PACE_EVENTS = 50


class Jobs:
    """A tenant's jobs; every method raises NotFound for a job that is not the tenant's."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._ledger = deps.ledger
        self._admission = deps.admission

    def get(self, tenant: str, job_id: str) -> JobObject:
        return self.shown(self._ledger.job(job_id, tenant))

    def shown(self, job: Job) -> JobObject:
        """The job with everything a single answer has: progress, attempt, estimated finish."""
        runs = self._ledger.runs(job.id)
        metrics: list[Event] = []
        if job.state is JobState.running:
            metrics, _ = self._ledger.events(job.id, limit=_PACE_EVENTS, newest_first=True)
        return JobViews().job(job, runs, metrics)

    def page(
        self,
        tenant: str,
        *,
        after: str | None,
        limit: int,
        metadata: Mapping[str, str],
        without_metadata: bool,
        submission_id: str | None,
    ) -> Listing[JobObject]:
        """Newest first. Raises InvalidConfig (code ``invalid_cursor``)."""
        with with_cursor_errors(after):
            jobs, more = self._ledger.jobs(
                tenant, after=after, limit=limit, metadata=metadata,
                without_metadata=without_metadata, submission_id=submission_id,
            )  # fmt: skip
        views = JobViews()
        return listing([views.job(job) for job in jobs], more)

    def cancel(self, tenant: str, job_id: str) -> JobObject:
        """Idempotent. Raises InvalidState when the job succeeded or failed."""
        return self.shown(self._admission.cancel(job_id, tenant))

    def pause(self, tenant: str, job_id: str) -> JobObject:
        """Idempotent. Raises InvalidState when the job has ended."""
        return self.shown(self._admission.pause(job_id, tenant))

    def resume(self, tenant: str, job_id: str) -> JobObject:
        """Idempotent. Raises InvalidState when the job has ended."""
        return self.shown(self._admission.resume(job_id, tenant))

    def retry(self, tenant: str, job_id: str) -> JobObject:
        """A new job with the same spec. Raises InvalidState, QuotaExceeded."""
        return self.shown(self._admission.retry(job_id, tenant))

    def runs(self, tenant: str, job_id: str) -> Listing[Run]:
        self._ledger.job(job_id, tenant)
        return listing(self._ledger.runs(job_id), False)

    def events(
        self,
        tenant: str,
        job_id: str,
        *,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
    ) -> Listing[EventObject]:
        """Raises InvalidConfig (code ``invalid_cursor``)."""
        self._ledger.job(job_id, tenant)
        events, more = self._ledger.events(
            job_id, after=event_cursor(after), limit=limit, newest_first=order == "desc"
        )
        return listing([event_object(event) for event in events], more)

    def checkpoints(
        self, tenant: str, job_id: str, *, after: str | None, limit: int
    ) -> Listing[CheckpointObject]:
        """Newest first. Raises InvalidConfig (code ``invalid_cursor``)."""
        job = self._ledger.job(job_id, tenant)
        points = [
            checkpoint_object(job, created_at, point)
            for created_at, point in reversed(self._ledger.checkpoints(job_id))
        ]
        # A resumed attempt may publish the very same bytes again.
        unique = {point.id: point for point in points}
        return page_of(list(unique.values()), after=after, limit=limit)
