"""JSON as RFC 8259 has it, and not a bit more: two readers with one verdict.

``read_exactly`` judges every text: no NaN, no Infinity, no number that overflows, no key twice,
UTF-8 only, nesting up to ``MAX_DEPTH``. ``read_quickly`` is about ten times as fast, and gives a
value only where it can prove that ``read_exactly`` would give the same; else it does not judge.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

MAX_DEPTH = 32
NOT_JUDGED = object()
# Everything msgspec raises over bytes that it does not accept.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Refused(Exception):
    """A row that cannot be used; ``index`` is the message's place in it."""

    def __init__(self, code: str, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason, self.index = code, reason, index


def read_json(raw: bytes) -> Any:
    """The value that ``raw`` holds. Raises Refused."""
    value = read_quickly(raw)
    return read_exactly(raw) if value is NOT_JUDGED else value


def read_exactly(raw: bytes) -> Any:
    """The value, judged to the last key. Raises Refused (lone surrogates are left in)."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("not_utf8", f"byte {error.start + 1} is not UTF-8") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Refused("invalid_json", f"{error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise Refused("too_deep", f"nested deeper than {MAX_DEPTH}") from None
    except ValueError:
        # Python refuses to convert integers of more than 4,300 digits.
        raise Refused("invalid_json", "a number has too many digits") from None
    if isinstance(value, (dict, list)) and strings_of(value) is None:
        raise Refused("too_deep", f"nested deeper than {MAX_DEPTH}")
    return value


def read_quickly(raw: bytes) -> Any:
    """The value, or NOT_JUDGED.

    msgspec reads the same grammar, but lets the last of two equal keys win. Every key is a string:
    where the value has as many strings as the text, none was lost.
    """
    try:
        value = _QUICK.decode(raw)
    except UNREADABLE:
        return NOT_JUDGED
    if not isinstance(value, (dict, list)):
        return NOT_JUDGED
    return value if strings_of(value) == strings_in(raw) else NOT_JUDGED


def strings_in(raw: bytes) -> int:
    """How many strings a valid JSON text holds, keys too: half its quotes that are not escaped."""
    # From the left, two backslashes are one that is escaped, and escapes nothing itself.
    rest = raw.replace(b"\\\\", b"")
    return (rest.count(b'"') - rest.count(b'\\"')) // 2


def strings_of(value: Any) -> int | None:
    """How many strings are in a value, keys too; None where it is nested too deep."""
    strings = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            items = node
            if isinstance(node, dict):
                strings += len(node)
                items = node.values()
            for item in items:
                if isinstance(item, str):
                    strings += 1
                elif isinstance(item, (dict, list)):
                    below.append(item)
        if not below:
            return strings
        level = below
    return None


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
_QUICK = msgspec.json.Decoder()
