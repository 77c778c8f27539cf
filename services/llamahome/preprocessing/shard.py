"""One shard of canonical rows -> token rows. Rows that cannot be trained on are dropped, counted.

The artifact: ``tokens.safetensors`` (conversations.tokens), ``hashes.bin`` (sha256 of each kept
row, 32 bytes), ``facts.npy`` (int64 [rows, 5], the columns of :class:`Facts`), ``dropped.jsonl``
(schemas.Rejected, lines of the file) and ``counts.json``.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from llamahome.conversations import Conversation, dump
from llamahome.conversations.chat import Tokenised
from llamahome.conversations.fastpath import FastRow
from llamahome.conversations.masks import Dropped
from llamahome.conversations.tokens import TokenRow, TokenRowsWriter
from llamahome.conversations.truncate import TooLong, kept_length
from llamahome.errors import InvalidConfig, InvalidData, Stopped
from llamahome.preprocessing.base import load_base
from llamahome.preprocessing.path import RowPath, Unproven
from llamahome.schemas import (
    JsonObject,
    Ports,
    Rejected,
    RunOutput,
    Stage,
    StageResult,
    StageTask,
    Step,
)

ROWS_NAME = "rows.jsonl"
TOKENS_NAME = "tokens.safetensors"
HASHES_NAME = "hashes.bin"
FACTS_NAME = "facts.npy"
DROPPED_NAME = "dropped.jsonl"
COUNTS_NAME = "counts.json"
_BATCH_ROWS = 64
_BATCH_BYTES = 1024 * 1024


class Facts(NamedTuple):
    """What is counted of a kept row, one column each."""

    stop_is_trained: bool
    tokens_cut: int
    neutralised: int
    slow: bool
    agreed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A canonical row and its place; ``line`` is 1-based in its file."""

    file: str
    line: int
    conversation: Conversation


def rows_of_plan(task: StageTask) -> RunOutput:
    """The validated shard that the task's plan names."""
    wanted = task.plan["rows"]
    shards = task.outputs_of(Stage.validation, Step.shard)
    return next(output for output in shards if output.shard == wanted)


def tokenise_shard(task: StageTask, ports: Ports) -> StageResult:
    """Ids and masks of every row. Raises InvalidData (too_long: error), InvalidConfig, Stopped."""
    folder = ports.scratch / "tokens"
    summary = write_shard(task, ports, folder)
    return StageResult(artifact=ports.publish(folder, "rows"), summary=summary)


def write_shard(
    task: StageTask, ports: Ports, folder: Path, *, refused: str | None = None
) -> JsonObject:
    """Fill ``folder`` with the shard that the task's plan names; its summary.

    ``refused`` says why the fast path must not be used. Raises as :func:`tokenise_shard`.
    """
    base, scope = load_base(task), task.spec.config["loss_scope"]
    fast, reason = base.fast(scope) if refused is None else (None, refused)
    try:
        return _write(
            task, ports, folder, RowPath(base.chat, fast, loss_scope=scope, reason=reason)
        )
    except Unproven as why:
        shutil.rmtree(folder)
        ports.event(f"The fast path is not used: {why}", level="warn", data={"reason": str(why)})
        slow = RowPath(base.chat, None, loss_scope=scope, reason=str(why))
        return _write(task, ports, folder, slow)


def _write(task: StageTask, ports: Ports, folder: Path, path: RowPath) -> JsonObject:
    source = rows_of_plan(task)
    assert source.artifact is not None, "a validation shard always has an artifact"
    # A file that cannot be cut is one validation shard, whose rows are in pieces.
    name = task.plan.get("piece", ROWS_NAME)
    rows_path = ports.folder(source.artifact, only=[name]) / name
    rows_in = int(task.plan.get("piece_rows") or source.summary["rows"])
    folder.mkdir()
    shard = _Shard(task, path, source.summary["index"])
    metadata = {"weight_scope": task.spec.config["loss_scope"]}
    with TokenRowsWriter(folder / TOKENS_NAME, metadata=metadata) as writer:
        done = 0
        for batch in _batches(rows_path, task.plan["first_line"]):
            _boundary(ports, done, rows_in)
            shard.add(batch, writer)
            done += len(batch)
    shard.write(folder)
    ports.progress(rows_in, rows_in)
    summary: JsonObject = {
        "rows": len(writer), "rows_in": rows_in, "split": task.plan["split"], "path": path.name,
        "path_reason": path.reason,
        "dropped": dict(sorted(shard.dropped.items())),
        "source": _source(task, source),
    }  # fmt: skip
    (folder / COUNTS_NAME).write_bytes(dump(summary) + b"\n")
    return summary


def _source(task: StageTask, source: RunOutput) -> JsonObject:
    """What tells this shard's rows from any other's, however the job was cut."""
    assert source.artifact is not None, "a validation shard always has an artifact"
    keys = ["first_line", "piece", "piece_rows"]
    if load_base(task).chat.uses_clock:
        keys.append("today")
    plan = {key: task.plan[key] for key in keys if task.plan.get(key) is not None}
    return {"digest": source.artifact.digest, "index": source.summary["index"], "plan": plan}


def _batches(path: Path, first_line: int) -> Iterator[list[Row]]:
    """The rows in lists of at most 64 rows or about 1 MiB: large enough to be worked on at once."""
    decode = msgspec.json.Decoder().decode
    batch: list[Row] = []
    size = 0
    with path.open("rb") as rows:
        for raw in rows:
            body = decode(raw)
            batch.append(Row(body["file"], body["line"] + first_line, Conversation.from_json(body)))
            size += len(raw)
            if len(batch) == _BATCH_ROWS or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _boundary(ports: Ports, done: int, total: int) -> None:
    ports.progress(done, total)
    if reason := ports.should_stop():
        raise Stopped(f"asked to stop: {reason}", code=reason)


class _Shard:
    """Works row by row and keeps what goes beside the tokens."""

    def __init__(self, task: StageTask, path: RowPath, source_file: int) -> None:
        config = task.spec.config
        self._max_length: int = config["max_length"]
        self._too_long: TooLong = config["too_long"]
        self._base_name = task.spec.base.name
        self._path = path
        self._source_file = source_file
        base = load_base(task)
        self._vocabulary = base.vocabulary
        self._markers = list(base.markers.added.values()) if base.markers else None
        # Where the fast way cannot give an id too large, its rows are not looked through for one.
        largest = path.largest_id
        self._check_all = self._vocabulary is not None and (
            largest is None or largest >= self._vocabulary
        )
        self._digests: list[bytes] = []
        self._facts: list[Facts] = []
        self._rejected: list[Rejected] = []
        self.dropped: Counter[str] = Counter()

    def add(self, rows: Sequence[Row], writer: TokenRowsWriter) -> None:
        """Work on rows and write what is kept of them. Raises Unproven, InvalidData."""
        conversations = [row.conversation for row in rows]
        digests = [conversation.digest() for conversation in conversations]
        done = self._path.tokenise_all(conversations, digests)
        for row, digest, (found, slow) in zip(rows, digests, done, strict=True):
            try:
                if isinstance(found, Dropped):
                    raise found
                self._keep(row, digest, found, slow, writer)
            except Dropped as dropped:
                self.dropped[dropped.code] += 1
                self._rejected.append(
                    Rejected(file=row.file, line=row.line, code=dropped.code, reason=dropped.reason)
                )

    def write(self, folder: Path) -> None:
        (folder / HASHES_NAME).write_bytes(b"".join(self._digests))
        np.save(
            folder / FACTS_NAME, np.array(self._facts, dtype="<i8").reshape(-1, len(Facts._fields))
        )
        lines = b"".join(dump(row.model_dump(mode="json")) + b"\n" for row in self._rejected)
        (folder / DROPPED_NAME).write_bytes(lines)

    def _keep(
        self,
        row: Row,
        digest: bytes,
        found: Tokenised | FastRow,
        slow: bool,
        writer: TokenRowsWriter,
    ) -> None:
        if slow or self._check_all:
            self._check_ids(found)
        try:
            kept = kept_length(found.trained, max_length=self._max_length, too_long=self._too_long)
        except InvalidData as error:
            raise InvalidData(
                error.message, code=error.code, remedy=error.remedy, file=row.file, line=row.line,
                field=error.place.field,
            ) from None  # fmt: skip
        writer.add(TokenRow(found.ids[:kept], found.trained[:kept], self._source_file, row.line))
        cut, stop = len(found.ids) - kept, found.stop_is_trained(kept)
        self._facts.append(Facts(stop, cut, found.neutralised, slow, found.agreed))
        self._digests.append(digest)

    def _check_ids(self, found: Tokenised | FastRow) -> None:
        ids = found.ids
        if self._markers is not None:
            # The model gets embeddings for these.
            ids = ids[~np.isin(ids, self._markers)]
        largest = int(ids.max(initial=0))
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise InvalidConfig(
                f"its tokenizer gives id {largest}, the model has {self._vocabulary} embeddings",
                code="invalid_base", file=self._base_name,
                remedy="Register a base whose tokenizer and model belong together",
            )  # fmt: skip
