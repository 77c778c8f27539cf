"""Lines of a byte range, so that a file can be cut anywhere and read by many."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

_CHUNK_BYTES = 1024 * 1024

# Longest first: UTF-32's mark starts with UTF-16's.
_FOREIGN_STARTS = (
    (codecs.BOM_UTF32_LE, "UTF-32 text; save it as UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32 text; save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "Zstandard; unpack it first"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"PAR1", "Parquet; write it as JSONL"),
)
HEAD_BYTES = 4


def foreign_format(head: bytes) -> str | None:
    """What a file with these first bytes is, if it cannot be JSONL; None where it may be."""
    return next((name for start, name in _FOREIGN_STARTS if head.startswith(start)), None)


def lines_of_range(
    stream: BinaryIO, start: int, end: int, *, max_line_bytes: int
) -> Iterator[tuple[bytes | None, int]]:
    r"""The lines that start in ``[start, end)``, each as (line, offset after it).

    The line comes without its ``\n`` or ``\r\n``; it is None where it is longer than
    ``max_line_bytes``, and is then never held whole. A range that does not start at 0 begins after
    the first newline at or after ``start - 1``, so ranges that touch give every line exactly once.
    """
    position = start
    if start > 0:
        stream.seek(start - 1)
        position = start - 1 + _skip_line(stream)
    else:
        stream.seek(0)
    while position < end:
        # Two more bytes for the line's end, which does not count.
        raw = stream.readline(max_line_bytes + 2)
        if not raw:
            return
        position += len(raw)
        if not raw.endswith(b"\n") and len(raw) == max_line_bytes + 2:
            position += _skip_line(stream)
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        yield (line if len(line) <= max_line_bytes else None), position


def _skip_line(stream: BinaryIO) -> int:
    """Read up to and with the next newline, in bounded memory; bytes read."""
    skipped = 0
    while piece := stream.readline(_CHUNK_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
