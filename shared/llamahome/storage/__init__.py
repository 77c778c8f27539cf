"""Artifacts and files on shared storage: checked paths, manifests, atomic publish."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from llamahome.errors import InvalidConfig
from llamahome.storage.layout import (
    artifact_key,
    artifact_path,
    attempt_path,
    checkpoint_path,
    model_path,
    upload_path,
)
from llamahome.storage.local import LocalStorage
from llamahome.storage.manifest import hash_stream
from llamahome.storage.protocol import Storage

__all__ = [
    "LocalStorage",
    "Storage",
    "artifact_key",
    "artifact_path",
    "attempt_path",
    "checkpoint_path",
    "hash_stream",
    "model_path",
    "open_storage",
    "upload_path",
]


def open_storage(url: str) -> Storage:
    """The storage at ``url``: ``file:///folder``, ``memory://name`` or ``s3://bucket/prefix``.

    Raises InvalidConfig for a URL that cannot be read, or whose driver is not installed.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidConfig(
                f"{url!r} names no local folder", field="storage_url",
                remedy="Write file:///path/to/folder",
            )  # fmt: skip
        return LocalStorage(Path(unquote(parts.path)))
    if not parts.scheme:
        raise InvalidConfig(
            f"{url!r} is no URL", field="storage_url",
            remedy="Write file:///path/to/folder or s3://bucket/prefix",
        )  # fmt: skip
    return _object_storage(url)


def _object_storage(url: str) -> Storage:
    from fsspec.core import url_to_fs

    from llamahome.storage.objects import ObjectStorage

    try:
        filesystem, root = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise InvalidConfig(
            f"{url!r} cannot be opened: {error}", field="storage_url",
            remedy="Install the fsspec driver of that scheme",
        ) from None  # fmt: skip
    return ObjectStorage(filesystem, root)
