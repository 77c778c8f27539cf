"""One byte range of one file -> canonical rows, rejected rows, counts. Streams; memory is bounded.

The artifact: ``rows.jsonl`` ({"file", "line", "messages", "tools"?} a line; of raw text {"file",
"line", "text", "weight"?}), ``rejected.jsonl`` (schemas.Rejected and "raw"), ``counts.json``
(schemas.FileCounts), ``hashes.bin`` (sha256 of each canonical row, 32 bytes) and ``lines.bin``
(int64 little-endian, the line of each row). Lines are counted from the shard's own start: what lies
before it, it has not read.

A file that cannot be cut (compressed, a JSON array, Parquet) is read whole by the shard that starts
at 0, and its rows are cut instead: ``rows.jsonl``, ``rows-1.jsonl``, ... of about ``shard_bytes``
each, so that preprocessing has as many shards as with lines.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from llamahome.conversations import (
    Limits,
    Record,
    Refused,
    Source,
    batches,
    dump,
    examine,
    records,
    shown_raw,
)
from llamahome.conversations.checker import Checked, RowChecker
from llamahome.conversations.formats import TEXT
from llamahome.errors import Stopped
from llamahome.schemas import (
    FileCounts,
    FileRef,
    JsonObject,
    Ports,
    Rejected,
    StageResult,
    StageTask,
)

ROWS_NAME = "rows.jsonl"
REJECTED_NAME = "rejected.jsonl"
COUNTS_NAME = "counts.json"
HASHES_NAME = "hashes.bin"
LINES_NAME = "lines.bin"
# Ask and tell after so many rows or bytes, whatever comes first.
_BOUNDARY_ROWS = 256
_BOUNDARY_BYTES = 1024 * 1024


def shard_file(task: StageTask) -> FileRef:
    """The file that the task's plan names."""
    spec = task.spec
    files = spec.validation_files if task.plan["split"] == "validation" else spec.training_files
    return files[task.plan["file"]]


def check_shard(task: StageTask, ports: Ports) -> StageResult:
    """Check the rows that start in the plan's range.

    Raises InvalidData (a broken archive), InvalidConfig (a missing extra), Stopped, Unavailable,
    OSError.
    """
    file = shard_file(task)
    folder = ports.scratch / "rows"
    folder.mkdir()
    limits, format = limits_and_format(task.spec.config["validation"])
    with ports.open(file) as stream:
        source = examine(stream, filename=file.filename, limits=limits, format=format)
        piece_bytes = None if source.divisible else task.spec.shard_bytes
        with ShardWriter(folder, source, piece_bytes=piece_bytes) as writer:
            lines = _check_rows(task, ports, stream, RowChecker(source, limits), writer)
    counts = writer.counts()
    (folder / COUNTS_NAME).write_bytes(dump(counts.model_dump(mode="json")) + b"\n")
    summary: JsonObject = {
        "rows": counts.valid,
        "file": file.filename,
        "split": task.plan["split"],
        "index": task.plan["file"],
        "start": task.plan["start"],
        "lines": lines,
    }
    if source.format == TEXT:
        summary["format"] = TEXT
    if len(writer.pieces) > 1:
        summary["pieces"] = writer.pieces
    return StageResult(artifact=ports.publish(folder, "rows"), summary=summary)


def limits_and_format(section: JsonObject) -> tuple[Limits, str | None]:
    """The job's ``validation`` settings; a format of None is for the file to show."""
    values = dict(section)
    format = values.pop("format", None)
    return Limits(**values), format


def piece_name(number: int) -> str:
    """The file of a shard's ``number``-th piece of rows."""
    return f"rows-{number}.jsonl" if number else ROWS_NAME


def _check_rows(
    task: StageTask, ports: Ports, stream: BinaryIO, checker: RowChecker, writer: ShardWriter
) -> int:
    """Write what the checker says of each row; how many lines there were."""
    start, end = task.plan["start"], task.plan["end"]
    if not checker.source.divisible:
        if start > 0:
            return 0
        end = shard_file(task).bytes
    told, waiting, line = start, 0, 0
    _stop_if_asked(ports)
    found = records(stream, checker.source, checker.limits, start=start, end=end)
    for batch in batches(found):
        writer.add(batch, checker.check(batch, first=start == 0))
        line, _, position = batch[-1]
        waiting += len(batch)
        if waiting >= _BOUNDARY_ROWS or position - told >= _BOUNDARY_BYTES:
            told, waiting = position, 0
            # The last line may reach beyond the range.
            ports.progress(min(position, end) - start, end - start)
            _stop_if_asked(ports)
    ports.progress(end - start, end - start)
    return line


def _stop_if_asked(ports: Ports) -> None:
    if reason := ports.should_stop():
        raise Stopped(f"asked to stop: {reason}", code=reason)


class ShardWriter:
    """The shard's files, written as the rows come. ``pieces``: rows in each piece."""

    def __init__(self, folder: Path, source: Source, *, piece_bytes: int | None = None) -> None:
        self._folder, self._source = folder, source
        self._piece_bytes = piece_bytes or sys.maxsize
        self._prefix = b'{"file":' + dump(source.filename) + b',"line":'
        self._stack = ExitStack()
        self._rows: BinaryIO | None = self._open(ROWS_NAME)
        self._rejected = self._open(REJECTED_NAME)
        self._hashes = self._open(HASHES_NAME)
        self._lines = self._open(LINES_NAME)
        self.pieces = [0]
        self._written = self._valid = self._blank = 0
        self._invalid: Counter[str] = Counter()
        # Rows of the batch at hand: text, digest, line.
        self._texts: list[bytes] = []
        self._digests: list[bytes] = []
        self._places: list[int] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(self, batch: Sequence[Record], found: Sequence[Checked]) -> None:
        """Write what the checker found of a batch of records."""
        for (line, record, _), checked in zip(batch, found, strict=True):
            if isinstance(checked, tuple):
                body, digest = checked
                self._texts.append(b"%b%d,%b\n" % (self._prefix, line, body[1:]))
                self._digests.append(digest)
                self._places.append(line)
                self._written += len(body)
                if self._written >= self._piece_bytes:
                    self._end_piece()
            elif checked is None:
                self._blank += 1
            else:
                self._add_rejected(checked, record)
        self._flush()

    def _flush(self) -> None:
        if self._texts and self._rows is None:
            self._rows = self._open(piece_name(len(self.pieces)))
            self.pieces.append(0)
        if self._rows is not None:
            self._rows.write(b"".join(self._texts))
        self._hashes.write(b"".join(self._digests))
        self._lines.write(struct.pack(f"<{len(self._places)}q", *self._places))
        self.pieces[-1] += len(self._texts)
        self._valid += len(self._texts)
        for waiting in (self._texts, self._digests, self._places):
            waiting.clear()

    def _end_piece(self) -> None:
        self._flush()
        if self._rows is not None:
            self._rows.close()
        # The next one is opened by the first row in it.
        self._rows, self._written = None, 0

    def _add_rejected(self, found: Rejected, record: bytes | Refused | None) -> None:
        self._invalid[found.code] += 1
        raw = record if isinstance(record, bytes) else None
        body = {**found.model_dump(mode="json"), "raw": shown_raw(raw)}
        self._rejected.write(dump(body) + b"\n")

    def counts(self) -> FileCounts:
        return FileCounts(
            file=self._source.filename,
            total=self._valid + self._invalid.total(),
            valid=self._valid,
            blank=self._blank,
            invalid=dict(sorted(self._invalid.items())),
            format=self._source.format,
            container=self._source.container,
        )

    def _open(self, name: str) -> BinaryIO:
        return self._stack.enter_context((self._folder / name).open("wb"))
