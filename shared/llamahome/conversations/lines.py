"""Lines of a byte range, so that a file can be cut anywhere and read by many."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

# Small enough to stay near the processor until its lines have been checked.
_CHUNK_BYTES = 256 * 1024
# The end of a range's last line is seldom far.
_BEYOND_BYTES = 64 * 1024

# Longest first: UTF-32's mark starts with UTF-16's.
_FOREIGN_STARTS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text; save it as UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32 text; save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"BZh", "bzip2; unpack it, or use .gz or .zst"),
    (b"\xfd7zXZ\x00", "xz; unpack it, or use .gz or .zst"),
)


def foreign_format(head: bytes) -> str | None:
    """What a file with these first bytes is, if it cannot be read; None where it may be."""
    return next((name for start, name in _FOREIGN_STARTS if head.startswith(start)), None)


def lines_of_range(
    stream: BinaryIO, start: int, end: int, *, max_line_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    r"""The lines that start in ``[start, end)``, each as (line, offset after it).

    The line comes without its ``\n`` or ``\r\n``; it is None where it is longer than
    ``max_line_bytes``, and is then never held whole. A range that does not start at 0 begins after
    the first newline at or after ``start - 1``, so ranges that touch give every line exactly once.
    A stream that cannot seek stands at ``start``.
    """
    position = _first_line(stream, start, end)
    # Of a line that goes on: its pieces, joined once, and the bytes held and dropped.
    pieces: list[bytes] = []
    held = dropped = 0
    while position < end:
        left = end - position - held - dropped
        chunk = stream.read(min(_CHUNK_BYTES, max(left, _BEYOND_BYTES)))
        if not chunk:
            if held or dropped:
                yield _whole(b"".join(pieces), dropped, max_line_bytes), position + held + dropped
            return
        lines = chunk.split(b"\n")
        if pieces and len(lines) > 1:
            lines[0] = b"".join([*pieces, lines[0]])
            pieces, held = [], 0
        rest = lines.pop()
        for line in lines:
            position += len(line) + 1 + dropped
            if dropped or len(line) >= max_line_bytes or line.endswith(b"\r"):
                yield _whole(line, dropped, max_line_bytes), position
                dropped = 0
            else:
                yield line, position
            if position >= end:
                return
        pieces.append(rest)
        held += len(rest)
        # One more byte may be the \r of the line's end, which does not count.
        if held > max_line_bytes + 1:
            pieces, held, dropped = [], 0, dropped + held
            if position + dropped >= end:
                # Where it ends does not matter: no other line starts in the range.
                yield None, position + dropped
                return


def _whole(line: bytes, dropped: int, max_line_bytes: int) -> bytes | None:
    line = line.removesuffix(b"\r")
    return line if not dropped and len(line) <= max_line_bytes else None


def _first_line(stream: BinaryIO, start: int, end: int) -> int:
    """Go to the first line that starts in the range; its offset, or one beyond the range."""
    if start == 0:
        if stream.seekable():
            stream.seek(0)
        return 0
    position = stream.seek(start - 1)
    while position < end and (piece := stream.readline(_CHUNK_BYTES)):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position
