"""Storage paths: relative, '/'-separated, checked before they touch a disk."""

from __future__ import annotations

import re

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,199}")


def checked_path(path: str) -> str:
    """``path`` unchanged. Raises ValueError: a bad path is our own mistake, never a user's."""
    parts = path.split("/")
    if not path or path.startswith("/") or "\0" in path or "\\" in path:
        raise ValueError(f"{path!r} is not a relative storage path")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} has an empty, '.' or '..' segment")
    if any(part.startswith(".tmp-") for part in parts):
        raise ValueError(f"{path!r} names a temporary file")
    return path


def checked_segment(name: str) -> str:
    """``name`` unchanged, where it may stand alone between two slashes. Raises ValueError."""
    if not _SEGMENT.fullmatch(name) or ".." in name:
        raise ValueError(f"{name!r} cannot be part of a storage path")
    return name
