"""Uploads: received, listed, read back, deleted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Literal

from llamahome.gateway import names
from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.multipart import Upload
from llamahome.gateway.objects import Deleted, FileObject, Listing
from llamahome.gateway.paging import listing, with_cursor_errors
from llamahome.gateway.views import file_object
from llamahome.schemas import StoredFile
from llamahome.storage import hash_stream

CHUNK_BYTES = 1024 * 1024


class Files:
    """What a tenant uploaded."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._ledger = deps.ledger
        self._storage = deps.storage
        self._admission = deps.admission

    def create(self, tenant: str, upload: Upload, *, retries: int) -> tuple[FileObject, bool]:
        """Make the upload durable; the file, and whether an earlier try had done so already.

        The stock clients repeat a failed upload with another multipart boundary each time, so a
        repeated one is known by its name, purpose and content. Raises Unavailable.
        """
        if retries > 0:
            first = self._earlier(tenant, upload)
            if first is not None:
                return file_object(first), True
        stored = self._admission.store_upload(
            tenant, filename=upload.filename, purpose=upload.purpose, stream=upload.stream
        )
        return file_object(stored), False

    def _earlier(self, tenant: str, upload: Upload) -> StoredFile | None:
        _, digest = hash_stream(upload.stream)
        upload.stream.seek(0)
        return self._ledger.find_file(
            tenant, filename=upload.filename, purpose=upload.purpose, sha256=digest,
            since=self._ledger.clock() - names.UPLOAD_RETRY_WINDOW_SECONDS,
        )  # fmt: skip

    def page(
        self,
        tenant: str,
        *,
        purpose: str | None,
        after: str | None,
        limit: int,
        order: Literal["asc", "desc"],
    ) -> Listing[FileObject]:
        """Raises InvalidConfig (code ``invalid_cursor``)."""
        with with_cursor_errors(after):
            files, more = self._ledger.files(
                tenant, purpose=purpose, after=after, limit=limit, newest_first=order == "desc"
            )
        return listing([file_object(file) for file in files], more)

    def get(self, tenant: str, file_id: str) -> FileObject:
        """Raises NotFound."""
        return file_object(self._ledger.file(file_id, tenant))

    def content(self, tenant: str, file_id: str) -> tuple[StoredFile, Iterator[bytes]]:
        """The record and the bytes, already open. Raises NotFound, Unavailable."""
        file = self._ledger.file(file_id, tenant)
        return file, chunks(self._storage.open(file.path))

    def delete(self, tenant: str, file_id: str) -> Deleted:
        """Raises NotFound. Jobs that were accepted with the file keep it."""
        self._ledger.delete_file(file_id, tenant)
        return Deleted(id=file_id)


def chunks(stream: BinaryIO) -> Iterator[bytes]:
    """The stream's bytes in pieces; closes it at the end."""
    with stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
