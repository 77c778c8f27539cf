"""One raw row of a file -> a canonical conversation, or the reason why not.

Strict on purpose (``strict_json``). The codes are stable and few; they are metric labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llamahome.conversations.containers import ARRAY, LINES
from llamahome.conversations.conversation import Conversation, dump
from llamahome.conversations.formats import MESSAGES, TEXT, canonical_row
from llamahome.conversations.records import Source
from llamahome.conversations.rules import Limits, checked_messages, checked_text, checked_tools
from llamahome.conversations.strict_json import Refused, read_json
from llamahome.schemas import Rejected

RAW_CHARS = 2000
_BOM = b"\xef\xbb\xbf"


def parse_row(
    raw: bytes | None,
    *,
    file: str,
    line: int,
    limits: Limits,
    first: bool | None = None,
    foreign: str | None = None,
    format: str = MESSAGES,
    read: Callable[[bytes], Any] = read_json,
) -> Conversation | Rejected | None:
    """What line ``line`` (1-based) of ``file`` holds; None for a blank line.

    ``raw`` is the row's JSON without the line's end, None where it was too long to be read. A byte
    order mark is no part of the file's ``first`` line (by default: line 1). ``foreign`` is what
    ``lines.foreign_format`` said of the file, ``format`` one of ``formats.FORMATS``. ``read`` is
    how the JSON is read.
    """
    try:
        if foreign is not None:
            raise Refused("not_utf8", f"the file is {foreign}")
        if raw is None:
            raise Refused("line_too_long", f"longer than {limits.max_line_bytes} bytes")
        if first or (first is None and line == 1):
            raw = raw.removeprefix(_BOM)
        if not raw.strip():
            return None
        return conversation_of(read(raw), limits, format)
    except Refused as refused:
        return Rejected(
            file=file, line=line, code=refused.code, reason=refused.reason, index=refused.index
        )


def parse_record(
    record: bytes | Refused | None,
    *,
    source: Source,
    line: int,
    limits: Limits,
    first: bool,
    number: int,
) -> Conversation | Rejected | None:
    """What the ``number``-th record of ``records.records`` holds; None for a blank line.

    ``first``: line 1 of the file. Only lines have a byte order mark of their own. Elements of an
    array are named by their number too, for a whole array may stand on one line.
    """
    found = _parsed(record, source, line, limits, first and source.layout == LINES)
    if isinstance(found, Rejected) and source.layout == ARRAY:
        return found.model_copy(update={"reason": f"element {number}: {found.reason}"})
    return found


def _parsed(
    record: bytes | Refused | None, source: Source, line: int, limits: Limits, first: bool
) -> Conversation | Rejected | None:
    if isinstance(record, Refused):
        return Rejected(file=source.filename, line=line, code=record.code, reason=record.reason)
    return parse_row(
        record, file=source.filename, line=line, limits=limits, first=first,
        foreign=source.foreign, format=source.format,
    )  # fmt: skip


def conversation_of(value: Any, limits: Limits, format: str) -> Conversation:
    """The conversation that a row's JSON value is. Raises Refused."""
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"the row is {kind_of(value)}, not an object")
    row = canonical_row(value, format)
    if format == TEXT:
        text, weight = checked_text(row, limits)
        return Conversation((), text=text, weight=weight)
    messages = checked_messages(row["messages"], limits)
    return Conversation(messages=messages, tools=checked_tools(row))


def shown_raw(raw: bytes | None) -> str:
    """A line as the quarantine file shows it: 2,000 characters at most, bad bytes escaped."""
    head = (raw or b"")[: 4 * RAW_CHARS]
    return head.decode("utf-8", "backslashreplace")[:RAW_CHARS]


def kind_of(value: Any) -> str:
    """The JSON word for a value's kind."""
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def shift_lines(rejected: Iterable[bytes], by: int) -> Iterator[bytes]:
    """Quarantine lines (JSON with ``line``) with ``by`` lines of the file before them counted in.

    A shard counts lines from its own start, for it has not read what lies before.
    """
    for raw in rejected:
        body = json.loads(raw)
        body["line"] += by
        yield dump(body) + b"\n"
