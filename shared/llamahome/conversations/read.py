"""Any local file of conversations, row by row: the simple way in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llamahome.conversations.conversation import Conversation
from llamahome.conversations.records import examine, records
from llamahome.conversations.rows import parse_record
from llamahome.conversations.rules import Limits
from llamahome.errors import InvalidData, NotFound
from llamahome.schemas import Rejected


def read_conversations(
    path: Path, *, limits: Limits | None = None, format: str | None = None
) -> Iterator[tuple[int, Conversation | Rejected]]:
    """Each row of the file as (line, conversation or why not), in order; memory is bounded.

    Lines are 1-based: the line a JSON array's element starts on, a Parquet row's number. Blank
    lines give nothing. ``format`` is one of ``formats.FORMATS``; None finds it out. Raises NotFound
    (no such file), InvalidData (not a file, not readable, a broken archive) and InvalidConfig (an
    unknown format, a missing extra).
    """
    limits = limits or Limits()
    try:
        with path.open("rb") as stream:
            source = examine(stream, filename=path.name, limits=limits, format=format)
            found = enumerate(records(stream, source, limits), 1)
            for number, (line, record, _) in found:
                row = parse_record(
                    record, source=source, line=line, limits=limits, first=line == 1, number=number
                )
                if row is not None:
                    yield line, row
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> NotFound | InvalidData:
    """The error of our tree for a file that the machine will not give."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"no file {path}", code="file_not_found", file=path.name)
    return InvalidData(
        f"cannot be read: {error.strerror or error}", code="unreadable_file", file=path.name
    )
