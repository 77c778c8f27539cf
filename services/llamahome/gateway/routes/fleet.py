"""The fleet itself: its processes, and whether this one can serve."""

from __future__ import annotations

from fastapi import APIRouter

from llamahome.gateway.context import Serving, Tenant
from llamahome.gateway.objects import Health, Listing
from llamahome.schemas import Worker

router = APIRouter(tags=["fleet"])


@router.get("/v1/fleet/workers")
def list_workers(services: Serving, _tenant: Tenant) -> Listing[Worker]:
    """The fleet's processes by their own heartbeats."""
    return Listing(data=services.deps.ledger.workers())


@router.get("/healthz")
def health(services: Serving) -> Health:
    """Whether this process answers and reaches the ledger (503 when not). Needs no key."""
    services.deps.ledger.clock()
    return Health()
