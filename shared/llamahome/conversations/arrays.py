"""One JSON array as a file: its elements one by one, in bounded memory.

Only strings and brackets are looked at, so an element that is bad JSON inside costs no other one as
long as its own can be trusted (``delimiting``). Where they cannot, and where an array has no end or
something after it, the file is refused as a whole: a quote or bracket that is missing swallows the
rows after it, and nobody can say how many.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import msgspec

from llamahome.conversations.delimiting import Delimiters
from llamahome.conversations.strict_json import UNREADABLE, Refused
from llamahome.errors import InvalidData

_CHUNK_BYTES = 256 * 1024
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_SOLID = re.compile(rb"[^ \t\r\n]")
_STRING = rb'"(?:[^"\\]++|\\.)*+"'


def _stretch(stops: bytes, levels: int) -> bytes:
    """All up to the next of ``stops``, over whole strings and whole brackets of so many levels.

    Possessive: no byte is looked at twice on one level. What is not whole (the buffer may end in
    it) or is deeper stops it too.
    """
    inner = rb"|[{\[]" + _stretch(rb'"{}\[\]', levels - 1) + rb"[}\]]" if levels else b""
    return rb"(?s:[^" + stops + rb"]++|" + _STRING + inner + rb")*+"


_WITHIN = re.compile(_stretch(rb'"{}\[\]', 4))
_BETWEEN = re.compile(_stretch(rb'"{}\[\],', 4))
# What matters in such a string.
_INSIDE = re.compile(rb'["\\]')
# Checks the grammar and builds nothing.
_GRAMMAR = msgspec.json.Decoder(msgspec.Raw)

Element = tuple[int, bytes | Refused | None, int]


class ArrayReader:
    """The elements of the array in ``stream``, which stands at its start.

    Iterating gives (line the element starts on, its bytes, offset after it). The bytes are None
    where there are more than ``max_bytes``, which are then never held; they are a Refused where the
    array is broken between elements. Raises InvalidData (broken_array) at an element whose end
    cannot be trusted, and at the end of an array that does not end where it should.
    """

    def __init__(self, stream: BinaryIO, *, filename: str, max_bytes: int) -> None:
        self._stream, self._filename, self._max_bytes = stream, filename, max_bytes
        self._buffer = b""
        # The next byte to look at, the buffer's offset in the file, the line of that next byte.
        self._at = self._offset = 0
        self._line = 1
        self._depth, self._in_string, self._escaped = 0, False, False

    def __iter__(self) -> Iterator[Element]:
        self._buffer = self._stream.read(len(_BOM))
        while len(self._buffer) < len(_BOM) and (more := self._stream.read(1)):
            self._buffer += more
        self._at = len(_BOM) if self._buffer.startswith(_BOM) else 0
        self._next()
        self._move(self._at + 1)  # the array's own bracket, which layout_of has seen
        byte, after_comma = self._next(), False
        while byte is not None and byte != b"]":
            line = self._line
            if byte in (b",", b"}"):
                self._move(self._at + 1)
                yield self._item(_broken(f"{byte.decode()!r} where an element must stand"), line)
                byte, after_comma = self._next(), False
                continue
            yield self._item(self._element(), line)
            byte = self._next()
            if after_comma := byte == b",":
                self._move(self._at + 1)
                byte = self._next()
        if after_comma and byte:
            yield self._item(_broken("a comma after the last element"))
        self._check_end(byte)

    def _check_end(self, byte: bytes | None) -> None:
        if byte is None:
            raise self._error("the array never ends")
        self._move(self._at + 1)
        if self._next() is not None:
            raise self._error("something follows the end of the array")

    def _error(self, what: str, line: int | None = None) -> InvalidData:
        return InvalidData(
            what, code="broken_array", file=self._filename, line=line or self._line,
            remedy="Mend or export it again, or send it as JSONL: nobody can say which rows are "
            "missing",
        )  # fmt: skip

    def _item(self, found: bytes | Refused | None, line: int | None = None) -> Element:
        return line or self._line, found, self._offset + self._at

    def _move(self, to: int) -> None:
        self._line += self._buffer.count(b"\n", self._at, to)
        self._at = to

    def _fill(self) -> bool:
        """Let go of the buffer, all of which is behind, and read on; False at the end."""
        self._offset += len(self._buffer)
        self._buffer, self._at = self._stream.read(_CHUNK_BYTES), 0
        return bool(self._buffer)

    def _next(self) -> bytes | None:
        """Go to the next byte that is no white space and return it; None at the end."""
        while (found := _SOLID.search(self._buffer, self._at)) is None:
            self._move(len(self._buffer))
            if not self._fill():
                return None
        self._move(found.start())
        return found.group()

    def _element(self) -> bytes | None:
        """The bytes up to what ends the element (a comma or a bracket), or the file's end."""
        parts: list[bytes] = []
        held, ended = 0, False
        begin, line = self._offset + self._at, self._line
        delimiters = None
        self._depth, self._in_string, self._escaped = 0, False, False
        while not ended:
            start = self._at
            ended, at = self._scan()
            self._move(at)
            parts.append(self._buffer[start:at])
            held += at - start
            if held > self._max_bytes + _CHUNK_BYTES:
                delimiters = delimiters or Delimiters()
                self._check(delimiters, parts, begin, line)
                parts.clear()
            if not ended and not self._fill():
                break
        if delimiters is not None:
            return None
        raw = b"".join(parts).rstrip(_SPACE)
        if not _is_json(raw):
            self._check(Delimiters(), [raw], begin, line)
        return raw if len(raw) <= self._max_bytes else None

    def _check(self, delimiters: Delimiters, parts: Iterable[bytes], begin: int, line: int) -> None:
        """Whether the element that starts at byte ``begin``, on ``line``, can be told from others.

        Raises InvalidData.
        """
        for part in parts:
            if fault := delimiters.feed(part):
                raise self._error(
                    f"{fault.words}, at byte {begin + fault.offset} in an element that starts on "
                    f"line {line}: a quote, a bracket or a comma is missing or too much",
                    line + fault.lines,
                )

    def _scan(self) -> tuple[bool, int]:
        """(the element ends here, offset in the buffer of what ends it or of the buffer's end)."""
        buffer, at = self._buffer, self._at
        if self._escaped and buffer:
            at, self._escaped = at + 1, False
        while at < len(buffer):
            if self._in_string:
                at = self._inside(at)
                continue
            at = self._outside(at)
            byte = buffer[at : at + 1]
            if byte == b'"':
                self._in_string = True
            elif byte in (b"{", b"["):
                self._depth += 1
            elif byte and self._depth == 0:
                return True, at
            elif byte:
                self._depth -= 1
            at += len(byte)
        return False, len(buffer)

    def _outside(self, at: int) -> int:
        found = (_WITHIN if self._depth else _BETWEEN).match(self._buffer, at)
        assert found is not None, "the pattern matches nothing at all, too"
        return found.end()

    def _inside(self, at: int) -> int:
        """A quote ends the string; a backslash hides the byte after it, which may be unread."""
        found = _INSIDE.search(self._buffer, at)
        if found is None:
            return len(self._buffer)
        if found.group() == b'"':
            self._in_string = False
        elif found.end() == len(self._buffer):
            self._escaped = True
        else:
            return found.end() + 1
        return found.end()


def _is_json(raw: bytes) -> bool:
    try:
        _GRAMMAR.decode(raw)
    except UNREADABLE:
        return False
    return True


def _broken(what: str) -> Refused:
    return Refused("broken_array", what)
