"""Whether an element of a JSON array that is not JSON ends where its quotes and brackets say.

A quote or a bracket that is missing in one row and another one in a later row make one element of
all the rows between them. Such an element shows it: where quotes are out of step, keys and texts
stand bare beside strings, and where brackets are, one opens where no value can stand or is closed
by another's. What else is wrong in an element (NaN, a comma too many, bad escapes) does not move
its end.
"""

from __future__ import annotations

import dataclasses
import re

_TOKEN = re.compile(rb'(?s)"(?:[^"\\]++|\\.)*+"|["{}\[\],:]|[^"{}\[\],: \t\r\n]++')
_REST_OF_STRING = re.compile(rb'(?s)(?:[^"\\]++|\\.)*+')
_OPENERS = {b"}": b"{", b"]": b"["}
# Far more than any row may have, and one byte of memory each.
_MAX_LEVELS = 100_000
# What a token was, as far as it matters to the next one.
_NOTHING, _COMMA, _COLON, _BARE, _VALUE = range(5)


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Where the end of the element got lost: ``offset`` bytes and ``lines`` after its start."""

    offset: int
    lines: int
    words: str


class Delimiters:
    """The quotes and brackets of one element, which comes in pieces."""

    def __init__(self) -> None:
        self._open = bytearray()
        self._last = _NOTHING
        self._in_string = self._escaped = False
        self._offset = self._lines = 0

    def feed(self, piece: bytes) -> Fault | None:
        """The next bytes of the element; the first thing in them that cannot be trusted."""
        at = self._string_goes_on(piece) if self._in_string else 0
        while (found := _TOKEN.search(piece, at)) is not None:
            if words := self._token(found.group()):
                at = found.start()
                return Fault(self._offset + at, self._lines + piece.count(b"\n", 0, at), words)
            at = self._string_goes_on(piece, found.end()) if self._in_string else found.end()
        self._offset += len(piece)
        self._lines += piece.count(b"\n")
        return None

    def _string_goes_on(self, piece: bytes, at: int = 0) -> int:
        """Where the string ends that began before ``at``, or the end of the piece."""
        found = _REST_OF_STRING.match(piece, at + self._escaped)
        end = len(piece) if found is None else found.end()
        # A backslash may be the last byte, with what it hides in the next piece.
        self._in_string = piece[end : end + 1] != b'"'
        self._escaped = self._in_string and end < len(piece)
        return len(piece) if self._in_string else end + 1

    def _token(self, token: bytes) -> str | None:
        """Take the token in; what is wrong with it."""
        last = self._last
        if token[:1] == b'"':
            self._in_string, self._last = token == b'"', _VALUE
            return "a string directly after another value" if last in (_BARE, _VALUE) else None
        if token in (b"{", b"["):
            return self._opened(token, last)
        if token in (b"}", b"]"):
            return self._closed(token)
        if token == b",":
            self._last = _COMMA
        elif token == b":":
            self._last = _COLON
            return None if self._open[-1:] == b"{" else "':' outside of an object"
        else:
            self._last = _BARE
            return "text directly after a string or a bracket" if last == _VALUE else None
        return None

    def _opened(self, token: bytes, last: int) -> str | None:
        may_stand = last == _COLON if self._open[-1:] == b"{" else last in (_NOTHING, _COMMA)
        self._open += token
        self._last = _NOTHING
        if len(self._open) > _MAX_LEVELS:
            return f"nested deeper than {_MAX_LEVELS}"
        return None if may_stand else f"{token.decode()!r} where no value can stand"

    def _closed(self, token: bytes) -> str | None:
        opener = bytes(self._open[-1:])
        del self._open[-1:]
        self._last = _VALUE
        if opener != _OPENERS[token]:
            return f"{token.decode()!r} closes {opener.decode()!r}"
        return None
