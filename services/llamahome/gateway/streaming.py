"""Downloads: bytes as they are read, never a whole file in memory, never on the event loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from urllib.parse import quote

from starlette.responses import StreamingResponse

from llamahome.gateway import names


def download(
    content: Iterator[bytes], *, size: int, sha256: str, filename: str
) -> StreamingResponse:
    """A file whose size and digest are known; the receiver can check both."""
    return StreamingResponse(
        content,
        media_type="application/octet-stream",
        headers={
            "content-length": str(size),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(filename)}",
            "etag": f'"{sha256}"',
            names.SHA256_HEADER: sha256,
        },
    )


def json_lines(content: Iterator[bytes]) -> StreamingResponse:
    """The first piece is read now, so that an error in opening it still becomes a status."""
    first = next(content, b"")
    return StreamingResponse(itertools.chain([first], content), media_type="application/x-ndjson")
