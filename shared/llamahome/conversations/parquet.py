"""Parquet rows as JSON bytes, for those who have the extra ``parquet`` (pyarrow)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from llamahome.conversations.conversation import dump
from llamahome.conversations.strict_json import Refused
from llamahome.errors import InvalidConfig, InvalidData

_BATCH_ROWS = 256
# A row group's column is unpacked as one.
MAX_GROUP_BYTES = 2 * 1024**3


def parquet_rows(stream: BinaryIO, *, filename: str) -> Iterator[tuple[bytes | Refused, float]]:
    """Each row's JSON, or why it has none, with the share of the rows read so far.

    Raises InvalidConfig (missing_extra) without pyarrow, InvalidData (broken_archive,
    archive_too_large) for a file that cannot be read.
    """
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InvalidConfig(
            f"{filename} is Parquet, which the extra parquet reads", code="missing_extra",
            remedy="pip install 'llamahome[parquet]', or write the rows as JSONL",
        ) from None  # fmt: skip
    try:
        file = parquet.ParquetFile(stream)
        _check_groups(file.metadata, filename)
        done, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                done += 1
                yield _as_json(row), done / total
    except (arrow.ArrowException, OSError) as error:
        raise InvalidData(
            f"cannot be read as Parquet: {error}", code="broken_archive", file=filename
        ) from None


def _check_groups(metadata: Any, filename: str) -> None:
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise InvalidData(
                f"row group {number} has {size} bytes, at most {MAX_GROUP_BYTES} are read",
                code="archive_too_large", file=filename, remedy="Write smaller row groups",
            )  # fmt: skip


def _as_json(row: Any) -> bytes | Refused:
    try:
        return dump(row)
    except (TypeError, ValueError) as error:
        # Bytes, dates and NaN have no JSON; UnicodeEncodeError is a ValueError.
        return Refused("invalid_json", f"a value of the row has no JSON form: {error}")
