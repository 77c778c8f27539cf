"""Training data named by URI: which ones may be read, and reading them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, BinaryIO, cast
from urllib.parse import unquote

import fsspec

from llamahome.errors import InvalidData, NotFound, Unavailable

_LOCAL = ("file", "local")  # fsspec's two words for this host's files


def is_allowed(uri: str, folders: Iterable[str]) -> bool:
    """Whether the URI lies strictly below one of the folders, compared name by name.

    One with an empty, ``.`` or ``..`` name in it (written as ``%2e`` too), or one that chains
    others (``::``), never does: what it means depends on who reads it. A local file is compared by
    where it really lies, so that no link leads out of its folder.
    """
    names = _names(uri)
    if "::" in uri or "\x00" in uri or "" in names[2:]:
        return False
    if {".", ".."} & set(unquote(uri).split("/")):
        return False
    return any(_is_below(names, _folder_names(folder)) for folder in folders)


def _names(uri: str) -> list[str]:
    """The scheme, the host (empty for a local file), and the names of the path."""
    scheme, _, rest = uri.partition("://")
    return [scheme.lower(), *rest.split("/")]


def _folder_names(folder: str) -> list[str]:
    names = _names(folder)
    while names[-1] == "":
        names.pop()
    return names


def _is_below(names: list[str], folder: list[str]) -> bool:
    if len(names) <= len(folder) or names[: len(folder)] != folder:
        return False
    if names[0] not in _LOCAL:
        return True
    place, root = (os.path.realpath("/".join(parts[1:]) or "/") for parts in (names, folder))
    return os.path.commonpath((place, root)) == root


@contextmanager
def open_uri(uri: str, field: str) -> Iterator[BinaryIO]:
    """The object's bytes, once, from the beginning: it may be another one when read again.

    Opening and reading raise NotFound, InvalidData for what we may not read, Unavailable for what
    may pass; each names the URI and the ``field`` that it stands in.
    """
    with ExitStack() as stack:
        with _reading(uri, field):
            source = stack.enter_context(fsspec.open(uri, "rb"))
        yield cast(BinaryIO, io.BufferedReader(_Source(source, uri, field)))


class _Source(io.RawIOBase):
    def __init__(self, source: IO[bytes], uri: str, field: str) -> None:
        super().__init__()
        self._source, self._uri, self._field = source, uri, field

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _reading(self._uri, self._field):
            chunk = self._source.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextmanager
def _reading(uri: str, field: str) -> Iterator[None]:
    """Give an OSError its meaning."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"no such file: {uri}", code="file_not_found", field=field) from None
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise InvalidData(
            f"{uri} cannot be read: {error.strerror or error}", field=field,
            remedy="Name a file that the service may read",
        ) from None  # fmt: skip
    except OSError as error:
        raise Unavailable(
            f"{uri} cannot be read: {error.strerror or error}", field=field
        ) from error
