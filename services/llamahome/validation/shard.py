"""One byte range of one file -> canonical rows, rejected rows, counts. Streams; memory is bounded.

The artifact: ``rows.jsonl`` ({"file", "line", "messages", "tools"?} a line), ``rejected.jsonl``
(schemas.Rejected and "raw"), ``counts.json`` (schemas.FileCounts), ``hashes.bin`` (sha256 of each
canonical row, 32 bytes) and ``lines.bin`` (int64 little-endian, the line of each row). Lines are
counted from the shard's own start: what lies before it, it has not read.
"""

from __future__ import annotations

import struct
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from llamahome.conversations import (
    HEAD_BYTES,
    Conversation,
    Limits,
    dump,
    foreign_format,
    lines_of_range,
    parse_row,
    shown_raw,
)
from llamahome.errors import Stopped
from llamahome.schemas import FileCounts, FileRef, Ports, Rejected, StageResult, StageTask

ROWS_NAME = "rows.jsonl"
REJECTED_NAME = "rejected.jsonl"
COUNTS_NAME = "counts.json"
HASHES_NAME = "hashes.bin"
LINES_NAME = "lines.bin"
_LINE = struct.Struct("<q")
# Ask and tell after so many lines or bytes, whatever comes first.
_BOUNDARY_LINES = 256
_BOUNDARY_BYTES = 1024 * 1024


def shard_file(task: StageTask) -> FileRef:
    """The file that the task's plan names."""
    spec = task.spec
    files = spec.validation_files if task.plan["split"] == "validation" else spec.training_files
    return files[task.plan["file"]]


def check_shard(task: StageTask, ports: Ports) -> StageResult:
    """Check the lines that start in the plan's range. Raises Stopped, Unavailable, OSError."""
    file = shard_file(task)
    folder = ports.scratch / "rows"
    folder.mkdir()
    with ports.open(file) as stream, ShardWriter(folder, file.filename) as writer:
        _check_lines(task, ports, stream, writer)
    counts = writer.counts()
    (folder / COUNTS_NAME).write_bytes(dump(counts.model_dump(mode="json")) + b"\n")
    summary = {
        "rows": counts.valid,
        "file": file.filename,
        "split": task.plan["split"],
        "index": task.plan["file"],
        "start": task.plan["start"],
        "lines": counts.total + counts.blank,
    }
    return StageResult(artifact=ports.publish(folder, "rows"), summary=summary)


def _check_lines(task: StageTask, ports: Ports, stream: BinaryIO, writer: ShardWriter) -> None:
    start, end = task.plan["start"], task.plan["end"]
    limits = Limits(**task.spec.config["validation"])
    foreign = foreign_format(stream.read(HEAD_BYTES))
    told, line = start, 0
    _stop_if_asked(ports)
    lines = lines_of_range(stream, start, end, max_line_bytes=limits.max_line_bytes)
    for line, (raw, position) in enumerate(lines, 1):
        first = start == 0 and line == 1
        found = parse_row(
            raw, file=writer.filename, line=line, limits=limits, first=first, foreign=foreign
        )
        writer.add(found, raw, line)
        if line % _BOUNDARY_LINES == 0 or position - told >= _BOUNDARY_BYTES:
            told = position
            # The last line may reach beyond the range.
            ports.progress(min(position, end) - start, end - start)
            _stop_if_asked(ports)
    ports.progress(end - start, end - start)


def _stop_if_asked(ports: Ports) -> None:
    if reason := ports.should_stop():
        raise Stopped(f"asked to stop: {reason}", code=reason)


class ShardWriter:
    """The shard's files, written as the lines come."""

    def __init__(self, folder: Path, filename: str) -> None:
        self.filename = filename
        self._stack = ExitStack()
        self._rows = self._open(folder / ROWS_NAME)
        self._rejected = self._open(folder / REJECTED_NAME)
        self._hashes = self._open(folder / HASHES_NAME)
        self._lines = self._open(folder / LINES_NAME)
        self._valid = self._blank = 0
        self._invalid: Counter[str] = Counter()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(self, found: Conversation | Rejected | None, raw: bytes | None, line: int) -> None:
        if found is None:
            self._blank += 1
        elif isinstance(found, Rejected):
            self._invalid[found.code] += 1
            body = {**found.model_dump(mode="json"), "raw": shown_raw(raw)}
            self._rejected.write(dump(body) + b"\n")
        else:
            self._valid += 1
            body = {"file": self.filename, "line": line, **found.to_json()}
            self._rows.write(dump(body) + b"\n")
            self._hashes.write(found.digest())
            self._lines.write(_LINE.pack(line))

    def counts(self) -> FileCounts:
        return FileCounts(
            file=self.filename,
            total=self._valid + self._invalid.total(),
            valid=self._valid,
            blank=self._blank,
            invalid=dict(sorted(self._invalid.items())),
        )

    def _open(self, path: Path) -> BinaryIO:
        return self._stack.enter_context(path.open("wb"))
