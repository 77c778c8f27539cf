"""Keyset pages: ``after`` is the id of the last item seen, so nothing repeats or is skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from fastapi import Request

from llamahome.errors import InvalidConfig, NotFound, nearest
from llamahome.gateway import names
from llamahome.gateway.objects import Listing

_NUL = "\x00"


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


def listing(items: Sequence[T], more: bool) -> Listing[T]:
    return Listing(
        data=list(items), has_more=more,
        first_id=items[0].id if items else None, last_id=items[-1].id if items else None,
    )  # fmt: skip


def invalid_cursor(after: str | None) -> InvalidConfig:
    return InvalidConfig(
        f"no such item to go on after: {after!r}", code="invalid_cursor", field="after",
        remedy="Use the id of the last item of the page before",
    )  # fmt: skip


@contextlib.contextmanager
def with_cursor_errors(after: str | None) -> Iterator[None]:
    """What is not found while listing is the cursor. Raises InvalidConfig."""
    try:
        yield
    except NotFound:
        if after is None:
            raise
        raise invalid_cursor(after) from None


def event_cursor(after: str | None) -> int | None:
    """``ftevent-<seq>`` -> seq. Raises InvalidConfig."""
    if after is None:
        return None
    digits = after.removeprefix(names.EVENT_ID_PREFIX)
    if digits == after or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        raise invalid_cursor(after)
    return int(digits)


def page_of(items: Sequence[T], *, after: str | None, limit: int) -> Listing[T]:
    """A page of a list that is short enough to be held whole. Raises InvalidConfig."""
    start = 0
    if after is not None:
        ids = [item.id for item in items]
        if after not in ids:
            raise invalid_cursor(after)
        start = ids.index(after) + 1
    return listing(items[start : start + limit], len(items) > start + limit)


def metadata_filter(request: Request) -> dict[str, str]:
    """``metadata[k]=v`` query parameters, as OpenAI's clients write them."""
    return {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.multi_items()
        if _is_metadata(key)
    }


def _is_metadata(key: str) -> bool:
    return key.startswith("metadata[") and key.endswith("]")


def refuse_unknown_query(request: Request) -> None:
    """A mistyped query parameter would silently answer another question. Raises InvalidConfig."""
    if _NUL in request.url.path or any(_NUL in value for value in request.query_params.values()):
        raise InvalidConfig("the URL holds a NUL character, which no name has")
    known = {param.alias for param in request.scope["route"].dependant.query_params}
    for key in request.query_params:
        if key in known or ("metadata" in known and _is_metadata(key)):
            continue
        raise InvalidConfig(
            f"Unknown query parameter: {key}", code="unknown_parameter", field=key,
            remedy=nearest(key, known),
        )  # fmt: skip
