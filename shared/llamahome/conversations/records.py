"""Any file as a stream of records, each the bytes of one row, and what kind of file it is.

A record is (line, bytes, offset): lines are 1-based and counted from the stream's start; the bytes
are None for a row longer than ``limits.max_line_bytes`` and a Refused where there is no row to
read; the offset says how far into the file (compressed, where it is) the reading is.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

from llamahome.conversations.arrays import ArrayReader
from llamahome.conversations.containers import (
    ARRAY,
    HEAD_BYTES,
    LINES,
    PARQUET,
    Unpacked,
    compression_of,
    head_of,
    layout_of,
)
from llamahome.conversations.formats import FORMATS, MESSAGES, recognise
from llamahome.conversations.lines import foreign_format, lines_of_range
from llamahome.conversations.parquet import parquet_rows
from llamahome.conversations.rules import Limits
from llamahome.conversations.strict_json import Refused, read_json
from llamahome.errors import InvalidConfig, nearest

Record = tuple[int, bytes | Refused | None, int]
# How far a file is read for the first row whose format can be told.
_HEAD_ROWS_BYTES = 4 * 1024 * 1024
# Small enough to stay near the processor; large enough to be proven at once.
_BATCH_ROWS = 64
_BATCH_BYTES = 1024 * 1024
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """``layout`` is jsonl, json (one array) or parquet; ``compression`` gz, zst or None.

    ``format`` is one of ``formats.FORMATS``. ``foreign`` names what the file is where it is nothing
    that can be read.
    """

    filename: str
    layout: str
    compression: str | None
    format: str
    foreign: str | None

    @property
    def container(self) -> str:
        """jsonl, jsonl.gz, json, json.zst, parquet, ..."""
        return f"{self.layout}.{self.compression}" if self.compression else self.layout

    @property
    def divisible(self) -> bool:
        """Whether byte ranges of it can be read apart."""
        return self.container == LINES


def examine(
    stream: BinaryIO, *, filename: str, limits: Limits, format: str | None = None
) -> Source:
    """What the file in the seekable ``stream`` is; ``format`` None or "auto" finds it out.

    Raises InvalidConfig (an unknown format, a missing extra), InvalidData (a broken archive).
    """
    if format not in (None, "auto", *FORMATS):
        raise InvalidConfig(
            f"unknown format {format!r}", field="format", remedy=nearest(str(format), FORMATS)
        )
    stream.seek(0)
    head = head_of(stream, max_line_bytes=limits.max_line_bytes)
    compression = compression_of(head)
    if compression:
        unpacked = _open(stream, filename, compression)
        head = head_of(unpacked, max_line_bytes=limits.max_line_bytes)
    found = Source(filename, layout_of(head), compression, MESSAGES, foreign_format(head))
    if format in FORMATS:
        return dataclasses.replace(found, format=format)
    return dataclasses.replace(found, format=_format_of(stream, found, limits))


def records(
    stream: BinaryIO, source: Source, limits: Limits, *, start: int = 0, end: int | None = None
) -> Iterator[Record]:
    """The file's records; of a divisible one, those of the lines that start in [start, end).

    Lines are counted from ``start``. Raises InvalidData and InvalidConfig as ``examine`` does, and
    OSError.
    """
    max_bytes = limits.max_line_bytes
    if source.divisible:
        size = stream.seek(0, io.SEEK_END) if end is None else end
        lines = lines_of_range(stream, start, size, max_line_bytes=max_bytes)
        yield from ((line, raw, position) for line, (raw, position) in enumerate(lines, 1))
        return
    if source.layout == PARQUET:
        yield from _parquet(stream, source, max_bytes)
        return
    stream.seek(0)
    text = _open(stream, source.filename, source.compression) if source.compression else stream
    if source.layout == ARRAY:
        found: Iterator[Record] = iter(
            ArrayReader(text, filename=source.filename, max_bytes=max_bytes)
        )
    else:
        unlimited = 2**63
        pairs = lines_of_range(text, 0, unlimited, max_line_bytes=max_bytes)
        found = ((line, raw, position) for line, (raw, position) in enumerate(pairs, 1))
    if not source.compression:
        yield from found
        return
    unpacked = cast(Unpacked, cast(io.BufferedReader, text).raw)
    for line, raw, _ in found:
        yield line, raw, unpacked.consumed


def batches(found: Iterable[Record]) -> Iterator[list[Record]]:
    """The records in lists of up to 64 rows or about 1 MiB, whatever comes first."""
    batch: list[Record] = []
    size = 0
    for record in found:
        batch.append(record)
        raw = record[1]
        size += len(raw) if isinstance(raw, bytes) else 0
        if size >= _BATCH_BYTES or len(batch) == _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open(stream: BinaryIO, filename: str, compression: str) -> BinaryIO:
    stream.seek(0)
    unpacked = Unpacked(stream, compression, filename=filename)
    return cast(BinaryIO, io.BufferedReader(unpacked, HEAD_BYTES))


def _parquet(stream: BinaryIO, source: Source, max_bytes: int) -> Iterator[Record]:
    if source.compression:
        yield 1, Refused("invalid_json", "compressed Parquet; send the file as it is"), 0
        return
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    rows = parquet_rows(stream, filename=source.filename)
    for line, (raw, share) in enumerate(rows, 1):
        too_long = isinstance(raw, bytes) and len(raw) > max_bytes
        yield line, None if too_long else raw, int(share * size)


def _format_of(stream: BinaryIO, source: Source, limits: Limits) -> str:
    """The format of the first row that has one; messages where none has."""
    if source.foreign:
        return MESSAGES
    read = 0
    # Rows too long for the limit are counted by how far the reading has got.
    end = _HEAD_ROWS_BYTES if source.divisible else None
    for _, raw, position in records(stream, source, limits, end=end):
        if isinstance(raw, bytes):
            read += len(raw)
            try:
                if found := recognise(read_json(raw.removeprefix(_BOM))):
                    return found
            except Refused:
                # The row is reported when it is checked.
                pass
        if max(read, position) > _HEAD_ROWS_BYTES:
            break
    return MESSAGES
