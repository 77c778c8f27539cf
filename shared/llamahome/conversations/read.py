"""Any local file of conversations, row by row: the simple way in."""

from __future__ import annotations

import os
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
    (no such file), InvalidData (not a file, not readable, a broken archive, a name that is not
    UTF-8) and InvalidConfig (an unknown format, a missing extra).
    """
    limits, name = limits or Limits(), checked_name(path.name)
    try:
        with path.open("rb") as stream:
            source = examine(stream, filename=name, limits=limits, format=format)
            found = enumerate(records(stream, source, limits), 1)
            for number, (line, record, _) in found:
                row = parse_record(
                    record, source=source, line=line, limits=limits, first=line == 1, number=number
                )
                if row is not None:
                    yield line, row
    except OSError as error:
        raise unreadable(path, error) from error


def checked_name(name: str) -> str:
    """``name`` of a file as reports and messages hold it. Raises InvalidData where it is not UTF-8:
    no JSON could.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidData(
            "its name is not UTF-8", code="unreadable_file",
            file=os.fsencode(name).decode("utf-8", "backslashreplace"),
            remedy="Rename the file or the folder; a report could not name it",
        ) from None  # fmt: skip
    return name


def unreadable(path: Path, error: OSError) -> NotFound | InvalidData:
    """The error of our tree for a file that the machine will not give."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"no file {path}", code="file_not_found", file=path.name)
    return InvalidData(
        f"cannot be read: {error.strerror or error}", code="unreadable_file", file=path.name
    )
