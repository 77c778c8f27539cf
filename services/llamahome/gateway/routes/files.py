"""/v1/files"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import StreamingResponse

from llamahome.gateway import names
from llamahome.gateway.context import Retries, Serving, Tenant
from llamahome.gateway.multipart import Upload, receive_upload
from llamahome.gateway.objects import Deleted, FileObject, Listing
from llamahome.gateway.streaming import download

router = APIRouter(prefix="/v1/files", tags=["files"])

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(names.PURPOSES)},
                    },
                }
            }
        },
    }
}


async def _received(request: Request, services: Serving, _tenant: Tenant) -> AsyncIterator[Upload]:
    # Asking for the tenant first: without a key not a byte of the body is read.
    async for upload in receive_upload(request, services.deps.settings.max_file_bytes):
        yield upload


@router.post("", openapi_extra=_FORM)
def create_file(
    services: Serving,
    tenant: Tenant,
    upload: Annotated[Upload, Depends(_received)],
    retries: Retries,
    response: Response,
) -> FileObject:
    """Upload a file."""
    file, replayed = services.files.create(tenant, upload, retries=retries)
    if replayed:
        response.headers[names.REPLAYED_HEADER] = "true"
    return file


@router.get("")
def list_files(
    services: Serving,
    tenant: Tenant,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Listing[FileObject]:
    """The tenant's files."""
    return services.files.page(tenant, purpose=purpose, after=after, limit=limit, order=order)


@router.get("/{file_id}")
def get_file(services: Serving, tenant: Tenant, file_id: str) -> FileObject:
    """One file's record."""
    return services.files.get(tenant, file_id)


@router.delete("/{file_id}")
def delete_file(services: Serving, tenant: Tenant, file_id: str) -> Deleted:
    """Hide the file; jobs accepted with it keep it."""
    return services.files.delete(tenant, file_id)


@router.get("/{file_id}/content", response_class=StreamingResponse)
def get_content(services: Serving, tenant: Tenant, file_id: str) -> StreamingResponse:
    """The bytes that were uploaded."""
    file, content = services.files.content(tenant, file_id)
    return download(content, size=file.bytes, sha256=file.sha256, filename=file.filename)
