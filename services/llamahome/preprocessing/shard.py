"""One shard of canonical rows -> token rows. Rows that cannot be trained on are dropped, counted.

The artifact: ``tokens.safetensors`` (conversations.tokens), ``hashes.bin`` (sha256 of each kept
row, 32 bytes), ``facts.npy`` (int64 [rows, 3]: stop token trained, tokens cut off, control tokens
neutralised), ``dropped.jsonl`` (schemas.Rejected, lines of the file) and ``counts.json``.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamahome.conversations import Conversation, dump
from llamahome.conversations.chat import ChatBase, Tokenised
from llamahome.conversations.masks import Dropped
from llamahome.conversations.tokens import TokenRow, TokenRowsWriter
from llamahome.conversations.truncate import kept_length
from llamahome.errors import InvalidConfig, InvalidData, Stopped
from llamahome.preprocessing.base import load_base
from llamahome.schemas import Ports, Rejected, RunOutput, Stage, StageResult, StageTask, Step

ROWS_NAME = "rows.jsonl"
TOKENS_NAME = "tokens.safetensors"
HASHES_NAME = "hashes.bin"
FACTS_NAME = "facts.npy"
DROPPED_NAME = "dropped.jsonl"
COUNTS_NAME = "counts.json"
_BOUNDARY_ROWS = 64


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
    base = load_base(task)
    source = rows_of_plan(task)
    assert source.artifact is not None, "a validation shard always has an artifact"
    rows_path = ports.folder(source.artifact) / ROWS_NAME
    folder = ports.scratch / "tokens"
    folder.mkdir()
    shard = _Shard(task, base.chat, source.summary["index"], base.vocabulary)
    scope = {"weight_scope": task.spec.config["loss_scope"]}
    with TokenRowsWriter(folder / TOKENS_NAME, metadata=scope) as writer:
        for done, row in enumerate(_rows(rows_path, task.plan["first_line"])):
            if done % _BOUNDARY_ROWS == 0:
                _boundary(ports, done, source.summary["rows"])
            shard.add(row, writer)
    shard.write(folder)
    ports.progress(source.summary["rows"], source.summary["rows"])
    summary = {
        "rows": len(writer), "rows_in": source.summary["rows"], "split": task.plan["split"],
        "dropped": dict(sorted(shard.dropped.items())),
    }  # fmt: skip
    (folder / COUNTS_NAME).write_bytes(dump(summary) + b"\n")
    return StageResult(artifact=ports.publish(folder, "rows"), summary=summary)


def _rows(path: Path, first_line: int) -> Iterator[Row]:
    with path.open("rb") as rows:
        for raw in rows:
            body = json.loads(raw)
            yield Row(body["file"], body["line"] + first_line, Conversation.from_json(body))


def _boundary(ports: Ports, done: int, total: int) -> None:
    ports.progress(done, total)
    if reason := ports.should_stop():
        raise Stopped(f"asked to stop: {reason}", code=reason)


class _Shard:
    """Works row by row and keeps what goes beside the tokens."""

    def __init__(
        self, task: StageTask, chat: ChatBase, source_file: int, vocabulary: int | None
    ) -> None:
        self._config = task.spec.config
        self._base_name = task.spec.base.name
        self._chat = chat
        self._source_file = source_file
        self._vocabulary = vocabulary
        self._digests: list[bytes] = []
        self._facts: list[tuple[bool, int, int]] = []
        self._rejected: list[Rejected] = []
        self.dropped: Counter[str] = Counter()

    def add(self, row: Row, writer: TokenRowsWriter) -> None:
        try:
            self._keep(row, writer)
        except Dropped as dropped:
            self.dropped[dropped.code] += 1
            self._rejected.append(
                Rejected(file=row.file, line=row.line, code=dropped.code, reason=dropped.reason)
            )

    def write(self, folder: Path) -> None:
        (folder / HASHES_NAME).write_bytes(b"".join(self._digests))
        np.save(folder / FACTS_NAME, np.array(self._facts, dtype="<i8").reshape(-1, 3))
        lines = b"".join(dump(row.model_dump(mode="json")) + b"\n" for row in self._rejected)
        (folder / DROPPED_NAME).write_bytes(lines)

    def _keep(self, row: Row, writer: TokenRowsWriter) -> None:
        found = self._chat.tokenise(row.conversation, loss_scope=self._config["loss_scope"])
        self._check_ids(found)
        try:
            kept = kept_length(
                found.trained,
                max_length=self._config["max_length"],
                too_long=self._config["too_long"],
            )
        except InvalidData as error:
            raise InvalidData(
                error.message, code=error.code, remedy=error.remedy, file=row.file, line=row.line,
                field=error.place.field,
            ) from None  # fmt: skip
        writer.add(TokenRow(found.ids[:kept], found.trained[:kept], self._source_file, row.line))
        cut = len(found.ids) - kept
        self._facts.append((found.stop_is_trained(kept), cut, found.neutralised))
        self._digests.append(row.conversation.digest())

    def _check_ids(self, found: Tokenised) -> None:
        largest = int(found.ids.max(initial=0))
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise InvalidConfig(
                f"its tokenizer gives id {largest}, the model has {self._vocabulary} embeddings",
                code="invalid_base", file=self._base_name,
                remedy="Register a base whose tokenizer and model belong together",
            )  # fmt: skip
