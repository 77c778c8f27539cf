"""Any row as the trainer will see it, token by token: what ``llamahome inspect`` shows.

No fleet and no storage: a file, a base's folder and a configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from llamahome.conversations import Conversation, Limits, read_conversations
from llamahome.conversations.chat import ChatBase, Tokenised
from llamahome.conversations.masks import Dropped
from llamahome.conversations.truncate import kept_length
from llamahome.errors import InvalidData
from llamahome.schemas import JsonObject, Rejected

Piece: TypeAlias = tuple[str, bool, bool]
Rows: TypeAlias = Iterable[tuple[int, "Conversation | Rejected"]]


@dataclasses.dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row of ``file``, 1-based ``line``: ``ids`` and ``trained`` (0 or 1) of each token.

    ``pieces`` are (text, trained, is_control), one a token, and their texts joined are the decoded
    row; of several tokens that share a character the first one has it. A row that would be dropped
    says why in ``dropped`` and has no tokens. ``cut`` tokens were cut off at max_length.
    """

    file: str
    line: int
    ids: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()
    dropped: str | None = None
    pieces: tuple[Piece, ...] = ()
    cut: int = 0

    def to_json(self) -> JsonObject:
        """What ``--json`` prints of it."""
        return {
            "file": self.file, "line": self.line, "ids": list(self.ids),
            "trained": list(self.trained), "dropped": self.dropped,
        }  # fmt: skip


def inspect_rows(
    path_or_conversations: Path | Rows,
    base_dir: Path,
    *,
    config: Mapping[str, Any],
    lines: Collection[int] | None = None,
    limit: int | None = None,
) -> Iterator[InspectedRow]:
    """The file's rows in order, through the job's template, cut and dropped as in a job.

    Instead of a file: (line, conversation or why not) pairs. ``config`` has a job's keys
    (``loss_scope``, ``max_length``, ``template``, ``too_long``, ``validation``). ``lines`` are the
    ones wanted, ``limit`` how many at most; None: all. Raises NotFound and InvalidConfig (the base,
    the file), InvalidData (the file; a long row where ``too_long`` is "error").
    """
    chat = ChatBase.load(base_dir, markers=config.get("template") == "markers")
    if isinstance(path_or_conversations, Path):
        name, found = path_or_conversations.name, _read(path_or_conversations, config)
    else:
        name, found = "conversations", path_or_conversations
    last = max(lines, default=0) if lines is not None else None
    shown = 0
    for line, row in found:
        if (limit is not None and shown >= limit) or (last is not None and line > last):
            return
        if lines is None or line in lines:
            shown += 1
            yield _inspected(chat, row, name, line, config)


def _read(path: Path, config: Mapping[str, Any]) -> Rows:
    section = dict(config.get("validation", {}))
    format = section.pop("format", None)
    return read_conversations(path, limits=Limits(**section), format=format)


def _inspected(
    chat: ChatBase, row: Conversation | Rejected, file: str, line: int, config: Mapping[str, Any]
) -> InspectedRow:
    if isinstance(row, Rejected):
        return InspectedRow(file, line, dropped=f"{row.code}: {row.reason}")
    try:
        found = chat.tokenise(row, loss_scope=config["loss_scope"])
        kept = kept_length(
            found.trained, max_length=config["max_length"], too_long=config["too_long"]
        )
    except Dropped as dropped:
        return InspectedRow(file, line, dropped=f"{dropped.code}: {dropped.reason}")
    except InvalidData as error:
        raise InvalidData(
            error.message, code=error.code, remedy=error.remedy, file=file, line=line,
            field=error.place.field,
        ) from None  # fmt: skip
    return InspectedRow(
        file=file, line=line, ids=tuple(found.ids[:kept].tolist()),
        trained=tuple(found.trained[:kept].astype(int).tolist()),
        pieces=tuple(_pieces(found, kept)), cut=len(found.ids) - kept,
    )  # fmt: skip


def _pieces(row: Tokenised, kept: int) -> Iterator[Piece]:
    at = 0
    for place in range(kept):
        end = max(at, int(row.ends[place]))
        yield row.text[at:end], bool(row.trained[place]), bool(row.control[place])
        at = end
