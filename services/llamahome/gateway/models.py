"""Models: the bases that can be trained here, and what the tenant made of them."""

from __future__ import annotations

from collections.abc import Iterator

from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.objects import Listing, ModelObject
from llamahome.gateway.views import base_object, fine_tuned_object
from llamahome.queueing.models import FINE_TUNED_PREFIX, fine_tuned_job
from llamahome.schemas import Job, JobState

_PAGE = 1000


class Models:
    def __init__(self, deps: GatewayDeps) -> None:
        self._ledger = deps.ledger

    def all(self, tenant: str) -> Listing[ModelObject]:
        """Bases by name, then the tenant's fine-tuned models, newest first."""
        bases = [base_object(base) for base in self._ledger.bases()]
        return Listing(data=bases + [fine_tuned_object(job) for job in self._succeeded(tenant)])

    def get(self, tenant: str, name: str) -> ModelObject:
        """Raises NotFound (code ``model_not_found``)."""
        if not name.startswith(FINE_TUNED_PREFIX):
            return base_object(self._ledger.base(name))
        return fine_tuned_object(fine_tuned_job(self._ledger, tenant, name))

    def _succeeded(self, tenant: str) -> Iterator[Job]:
        after: str | None = None
        more = True
        while more:
            jobs, more = self._ledger.jobs(tenant, after=after, limit=_PAGE)
            yield from (job for job in jobs if job.state is JobState.succeeded)
            after = jobs[-1].id if jobs else None
