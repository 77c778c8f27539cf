"""Checks rows, the plain ones fast.

msgspec reads and checks a plain messages row in one go; what it does not accept, or cannot prove,
``rows`` judges. So the fast way only ever says yes, and says it where the exact way would, with
the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from llamahome.conversations.conversation import Conversation
from llamahome.conversations.formats import MESSAGES
from llamahome.conversations.records import Record, Source
from llamahome.conversations.rows import parse_record
from llamahome.conversations.rules import SEEN, Limits, check_structure, is_visible
from llamahome.conversations.strict_json import UNREADABLE, Refused, strings_in
from llamahome.schemas import Rejected

# Roles in so many orders are known to be fine.
_ORDERS = 1000
# The row's JSON on one line, and the conversation's digest.
Accepted = tuple[bytes, bytes]
Checked = Accepted | Rejected | None


class _Turn(msgspec.Struct, gc=False):
    """Fields in the order of the alphabet: packed, they are what ``Conversation.digest`` hashes."""

    content: str
    role: Literal["system", "user", "assistant", "tool"]


class _Row(msgspec.Struct, gc=False):
    messages: list[_Turn]


class RowChecker:
    """Checks the records of one file, a batch at a time and in their order."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source, self.limits = source, limits
        plain = source.format == MESSAGES and not source.foreign
        self._judge = _Judge(limits) if plain else None
        self._done = 0

    def check(self, batch: Sequence[Record], *, first: bool = False) -> list[Checked]:
        """What each record of the batch is. ``first``: line 1 is the file's."""
        found: list[Checked] = [None] * len(batch)
        if self._judge is not None:
            found[:] = self._judge.accept([record for _, record, _ in batch])
        for place, done in enumerate(found):
            if done is None:
                line, record, _ = batch[place]
                number = self._done + place + 1
                found[place] = self._exactly(record, line, number, first=first and line == 1)
        self._done += len(batch)
        return found

    def _exactly(
        self, record: bytes | Refused | None, line: int, number: int, *, first: bool
    ) -> Checked:
        found = parse_record(
            record, source=self.source, line=line, limits=self.limits, first=first,
            number=number,
        )  # fmt: skip
        if isinstance(found, Conversation):
            return found.to_bytes(), found.digest()
        return found


class _Judge:
    """Accepts the bytes of plain rows as they are written.

    A row is accepted when the strings read from it are as many as its text holds: then no key stood
    twice and none was skipped (``strict_json.read_quickly``). That is told for a batch at once: no
    row can hold fewer strings than were read from it, so where the sums agree, all do.
    """

    def __init__(self, limits: Limits) -> None:
        self._max_messages = limits.max_messages
        # No text is longer than the bytes it stands in.
        self._max_bytes = limits.max_chars_per_message
        self._orders: set[str] = set()
        self._decode = msgspec.json.Decoder(_Row).decode
        self._pack = msgspec.msgpack.Encoder().encode

    def accept(self, records: Sequence[bytes | Refused | None]) -> list[Accepted | None]:
        found: list[Accepted | None] = []
        taken: list[bytes] = []
        decode, pack, digest = self._decode, self._pack, hashlib.sha256
        turns = 0
        for raw in records:
            accepted = None
            if isinstance(raw, bytes) and raw[:1] == b"{" and len(raw) <= self._max_bytes:
                try:
                    row = decode(raw)
                except UNREADABLE:
                    pass
                else:
                    if self._is_fine(row.messages):
                        turns += len(row.messages)
                        taken.append(raw)
                        # Elements of an array may stand on several lines.
                        body = raw if b"\n" not in raw else msgspec.json.encode(row)
                        accepted = body, digest(pack(row)).digest()
            found.append(accepted)
        if taken and _strings_in(b"\n".join(taken)) != _strings_of(len(taken), turns):
            return [
                accepted and self._proven(raw, accepted)
                for raw, accepted in zip(records, found, strict=True)
            ]
        return found

    def _is_fine(self, turns: Sequence[_Turn]) -> bool:
        roles = ""
        for turn in turns:
            roles += turn.role
            if turn.content[:1] not in SEEN and not is_visible(turn.content):
                return False
        if len(turns) > self._max_messages:
            return False
        return roles in self._orders or self._remember(roles, turns)

    def _remember(self, roles: str, turns: Sequence[_Turn]) -> bool:
        """Whether turns of these roles may follow each other; ``roles`` is their names in a row."""
        try:
            check_structure([turn.role for turn in turns])
        except Refused:
            return False
        if len(self._orders) < _ORDERS:
            self._orders.add(roles)
        return True

    def _proven(self, raw: bytes | Refused | None, accepted: Accepted) -> Accepted | None:
        assert isinstance(raw, bytes), "only bytes are accepted"
        strings = _strings_of(1, len(self._decode(raw).messages))
        return accepted if strings_in(raw) == strings else None


def _strings_of(rows: int, turns: int) -> int:
    """A row's key messages, and of each turn two keys and their values."""
    return rows + 4 * turns


def _strings_in(text: bytes) -> int:
    """``strict_json.strings_in`` of much text, some ten times as fast."""
    byte = np.frombuffer(text, np.uint8)
    backslash = byte == 0x5C
    if np.any(backslash[1:] & backslash[:-1]):
        byte = np.frombuffer(text.replace(b"\\\\", b""), np.uint8)
        backslash = byte == 0x5C
    quote = byte == 0x22
    escaped = np.count_nonzero(quote[1:] & backslash[:-1])
    return (int(np.count_nonzero(quote)) - int(escaped)) // 2
