"""/v1/models"""

from __future__ import annotations

from fastapi import APIRouter

from llamahome.gateway.context import Serving, Tenant
from llamahome.gateway.objects import Listing, ModelObject

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(services: Serving, tenant: Tenant) -> Listing[ModelObject]:
    """The bases, and the tenant's fine-tuned models."""
    return services.models.all(tenant)


# A path, because the stock client of version 1 does not escape a "/" in a name.
@router.get("/{model:path}")
def get_model(services: Serving, tenant: Tenant, model: str) -> ModelObject:
    """One base or fine-tuned model."""
    return services.models.get(tenant, model)
