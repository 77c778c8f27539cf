"""One raw line of a JSONL file -> a canonical conversation, or the reason why not.

Strict on purpose: JSON as RFC 8259 has it (no NaN, no Infinity, no number that overflows), no key
twice, UTF-8 only, no lone surrogates, nesting up to ``MAX_DEPTH``. The codes are stable and few;
they are metric labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llamahome.conversations.conversation import Conversation, dump
from llamahome.conversations.rules import Limits, Refused, checked_messages, checked_tools
from llamahome.schemas import Rejected

MAX_DEPTH = 32
RAW_CHARS = 2000
_BOM = b"\xef\xbb\xbf"
_MESSAGE_KEYS = ("messages", "conversation", "conversations")


def parse_row(
    raw: bytes | None,
    *,
    file: str,
    line: int,
    limits: Limits,
    first: bool | None = None,
    foreign: str | None = None,
) -> Conversation | Rejected | None:
    """What line ``line`` (1-based) of ``file`` holds; None for a blank line.

    ``raw`` is the line without its end, None where it was too long to be read. A byte order mark is
    no part of the file's ``first`` line (by default: line 1). ``foreign`` is what
    ``lines.foreign_format`` said of the file.
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
        return _conversation(_parse(raw), limits)
    except Refused as refused:
        return Rejected(
            file=file, line=line, code=refused.code, reason=refused.reason, index=refused.index
        )


def shown_raw(raw: bytes | None) -> str:
    """A line as the quarantine file shows it: 2,000 characters at most, bad bytes escaped."""
    head = (raw or b"")[: 4 * RAW_CHARS]
    return head.decode("utf-8", "backslashreplace")[:RAW_CHARS]


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("not_utf8", f"byte {error.start + 1} is not UTF-8") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Refused("invalid_json", f"{error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise Refused("too_deep", f"nested deeper than {MAX_DEPTH}") from None
    except ValueError:
        # Python refuses to convert integers of more than 4,300 digits.
        raise Refused("invalid_json", "a number has too many digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Refused("duplicate_key", f"the key {twice[:50]!r} stands twice in one object")
    return found


def _constant(name: str) -> Any:
    raise Refused("not_finite", f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused("not_finite", f"the number {text[:30]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def _conversation(value: Any, limits: Limits) -> Conversation:
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"the line is {kind_of(value)}, not an object")
    _check_depth(value)
    messages = checked_messages(_messages(value), limits)
    tools = checked_tools(value)
    return Conversation(messages=messages, tools=tools)


def _messages(row: Mapping[str, Any]) -> Any:
    given = [key for key in _MESSAGE_KEYS if key in row]
    if not given:
        raise Refused("missing_messages", "has no key messages, conversation or conversations")
    if any(row[key] != row[given[0]] for key in given[1:]):
        raise Refused("ambiguous_messages", f"{' and '.join(given)} differ")
    return row[given[0]]


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise Refused("too_deep", f"nested deeper than {MAX_DEPTH}")


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
