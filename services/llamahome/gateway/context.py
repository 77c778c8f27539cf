"""What a handler is given: the services, and whose request it is."""

from __future__ import annotations

import dataclasses
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from llamahome.errors import Unauthenticated
from llamahome.gateway import names
from llamahome.gateway.creation import JobCreation
from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.files import Files
from llamahome.gateway.jobs import Jobs
from llamahome.gateway.models import Models
from llamahome.gateway.results import Results


@dataclasses.dataclass(frozen=True, slots=True)
class Services:
    """All that handlers call; made once for an app."""

    deps: GatewayDeps
    files: Files
    jobs: Jobs
    creation: JobCreation
    results: Results
    models: Models

    @classmethod
    def of(cls, deps: GatewayDeps) -> Services:
        return cls(deps, Files(deps), Jobs(deps), JobCreation(deps), Results(deps), Models(deps))


def _services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


Serving = Annotated[Services, Depends(_services)]

_bearer = HTTPBearer(auto_error=False, description="An API key: `llamahome keys create`")


def _tenant(
    services: Serving,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """The key's tenant. Raises Unauthenticated."""
    if credentials is None or not credentials.credentials:
        raise Unauthenticated(
            "You didn't provide an API key",
            remedy="Send the header Authorization: Bearer KEY",
        )
    return services.deps.ledger.tenant_of(credentials.credentials)


Tenant = Annotated[str, Depends(_tenant)]


def _retries(request: Request) -> int:
    """How often the client says it has tried this request before; not a number counts as 0."""
    text = request.headers.get(names.RETRY_COUNT_HEADER, "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0


Retries = Annotated[int, Depends(_retries)]


async def _raw_body(request: Request) -> bytes:
    return await request.body()


RawBody = Annotated[bytes, Depends(_raw_body)]


def _idempotency_key(request: Request) -> str | None:
    return request.headers.get(names.IDEMPOTENCY_KEY_HEADER) or None


IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
