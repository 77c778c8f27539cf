"""Receiving an upload: spooled to a temporary file as it arrives, never whole in memory.

Large parts go to the folder that ``TMPDIR`` names, then to storage, which takes their sha256 on
the way; the form's ``purpose`` may come after the file, so nothing can be stored before the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import PurePosixPath
from typing import BinaryIO

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from llamahome.errors import InvalidConfig, InvalidData, nearest
from llamahome.gateway import names

_FIELDS = ("file", "purpose")
_EXPIRY = "expires_after"
_FORM_OVERHEAD_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Upload:
    """A received file. ``filename`` is a label only and never becomes a path."""

    filename: str
    purpose: str
    stream: BinaryIO


async def receive_upload(request: Request, limit_bytes: int) -> AsyncIterator[Upload]:
    """Yield the one upload of a multipart request; its temporary file ends with the request.

    Raises InvalidData (code ``file_too_large`` above ``limit_bytes``), InvalidConfig with the
    form field at fault; an empty file is one.
    """
    form = await _parse(request, limit_bytes)
    try:
        yield _checked(form, limit_bytes)
    finally:
        await form.close()


async def _parse(request: Request, limit_bytes: int) -> FormData:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidConfig("the body must be multipart/form-data", code="invalid_value")
    stream = _limited(request, limit_bytes)
    try:
        return await MultiPartParser(request.headers, stream, max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise InvalidConfig(f"broken multipart body: {error.message}") from None


async def _limited(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes + _FORM_OVERHEAD_BYTES:
            raise _too_large(limit_bytes)
        yield chunk


def _too_large(limit_bytes: int) -> InvalidData:
    return InvalidData(
        f"the file has more than {limit_bytes} bytes, the most that is accepted",
        code="file_too_large", field="file", remedy="Split it, or ask the operator",
    )  # fmt: skip


def _checked(form: FormData, limit_bytes: int) -> Upload:
    for name in form:
        if name.partition("[")[0] == _EXPIRY:
            raise InvalidConfig(
                "files do not expire here", code="unsupported_parameter", field=_EXPIRY,
                remedy="Delete the file when it is no longer needed",
            )  # fmt: skip
        if name not in _FIELDS:
            raise InvalidConfig(
                f"Unrecognized request argument supplied: {name}", code="unknown_parameter",
                field=name, remedy=nearest(name, _FIELDS),
            )  # fmt: skip
    for name in _FIELDS:
        if name not in form:
            raise InvalidConfig(
                f"Missing required parameter: {name}", code="missing_required_parameter",
                field=name,
            )  # fmt: skip
    file, purpose = form["file"], form["purpose"]
    if not isinstance(file, UploadFile) or not isinstance(purpose, str):
        raise InvalidConfig("file must be a file part, and purpose a text part", field="file")
    if (file.size or 0) > limit_bytes:
        raise _too_large(limit_bytes)
    if not file.size:
        raise InvalidConfig("the file is empty", field="file", remedy="Upload one that has rows")
    return Upload(_label(file.filename), check_purpose(purpose), file.file)


def _label(filename: str | None) -> str:
    name = PurePosixPath((filename or "").replace("\\", "/")).name
    if not name or len(name) > names.MAX_FILENAME_CHARS or not name.isprintable():
        raise InvalidConfig(
            f"the file's name must have 1 to {names.MAX_FILENAME_CHARS} printable characters",
            field="file",
        )
    return name


def check_purpose(purpose: str) -> str:
    """Raises InvalidConfig with the purposes there are."""
    if purpose not in names.PURPOSES:
        raise InvalidConfig(
            f"{purpose!r} is not a purpose", field="purpose",
            remedy=f"One of {', '.join(names.PURPOSES)}; for training: {names.FINE_TUNE}",
        )  # fmt: skip
    return purpose
