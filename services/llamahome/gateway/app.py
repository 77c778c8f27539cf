"""The app: routes, what surrounds them, and errors in OpenAI's envelope for every status."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llamahome.errors import LlamaHomeError
from llamahome.gateway.context import Services
from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.middleware import BodyLimit, RequestEnvelope
from llamahome.gateway.objects import ErrorEnvelope
from llamahome.gateway.paging import refuse_unknown_query
from llamahome.gateway.problems import envelope, error_response, validation_problem
from llamahome.gateway.requests import KNOWN_FIELDS
from llamahome.gateway.routes import ROUTERS


def create_app(deps: GatewayDeps) -> FastAPI:
    """An ASGI app over ``deps``; it opens and closes none of them."""
    app = surface()
    app.state.services = Services.of(deps)
    return app


def surface() -> FastAPI:
    """The app with nothing behind its routes: what the OpenAPI document is made from."""
    app = FastAPI(
        title="LlamaHome Training",
        version="1",
        description="OpenAI-compatible fine-tuning: files, jobs, models",
        # Strangers learn nothing, not even the routes; the document is in the repository.
        openapi_url=None,
        # An unknown route is a 404 in the envelope, not a redirect.
        redirect_slashes=False,
        dependencies=[Depends(refuse_unknown_query)],
        responses={"default": {"model": ErrorEnvelope, "description": "Any error"}},
    )
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(LlamaHomeError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestEnvelope)  # added last, so outermost
    return app


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlamaHomeError)
    return error_response(error)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_problem(error, KNOWN_FIELDS))


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return envelope(404, f"Invalid URL ({where})", code="unknown_url")
    if error.status_code == 405:
        return envelope(
            405, f"Not allowed to {where}", code="method_not_allowed",
            headers=dict(error.headers or {}),
        )  # fmt: skip
    return envelope(error.status_code, str(error.detail), code="invalid_request")
