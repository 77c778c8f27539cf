"""The canonical conversation: what every format becomes, and the only thing later steps see."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from llamahome.schemas import JsonObject

ASSISTANT = "assistant"
_AS_IT_IS = msgspec.json.Encoder()
# ``fast`` packs its own types to the same bytes: a row's digest must not depend on who read it.
_CANONICAL = msgspec.msgpack.Encoder(order="sorted")


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order, or one ``text``; already checked by ``rows.parse_row``.

    A message has ``role`` (system, user, assistant or tool), ``content`` (missing only where an
    assistant turn is made of tool calls), and optionally ``weight`` (0: not trained), ``name``,
    ``tool_calls``, ``tool_call_id``, ``reasoning_content``. Neither may be changed in place.

    A row of raw text has neither messages nor tools, but ``text``, and a ``weight`` of its own.
    """

    messages: tuple[JsonObject, ...]
    tools: tuple[JsonObject, ...] = ()
    text: str | None = None
    weight: int = 1

    def to_json(self) -> JsonObject:
        """Keys in a fixed order; ``tools`` only where there are any, ``weight`` where it is 0."""
        if self.text is not None:
            return {"text": self.text} if self.weight else {"text": self.text, "weight": 0}
        body: JsonObject = {"messages": list(self.messages)}
        return body | {"tools": list(self.tools)} if self.tools else body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Conversation:
        """The inverse of :meth:`to_json`; further keys (file, line) are left alone."""
        if "messages" not in body:
            return cls((), text=body["text"], weight=body.get("weight", 1))
        return cls(tuple(body["messages"]), tuple(body.get("tools", ())))

    def digest(self) -> bytes:
        """sha256, 32 bytes: equal for rows that differ in key order and JSON whitespace only."""
        body = self.to_json()
        try:
            packed = _CANONICAL.encode(body)
        except OverflowError:
            # An integer of more than 64 bits, somewhere in a tool.
            packed = dump(body, sort_keys=True)
        return hashlib.sha256(packed).digest()

    def to_bytes(self) -> bytes:
        """Compact UTF-8 JSON of :meth:`to_json`; keys stay in order, for templates show it."""
        return _AS_IT_IS.encode(self.to_json())

    def assistant_turns(self) -> tuple[int, ...]:
        """Indices of the assistant's messages."""
        return tuple(i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT)

    def trained_turns(self, scope: str) -> frozenset[int]:
        """Indices of the assistant messages that ``scope`` trains; ``weight`` 0 is never in it."""
        turns = self.assistant_turns()
        if scope == "last":
            turns = turns[-1:]
        return frozenset(turn for turn in turns if self.messages[turn].get("weight", 1) == 1)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every string that came from outside, as (role, text).

        Tools and raw text count as the system's.
        """
        if self.text is not None:
            yield "system", self.text
        for message in self.messages:
            for key, value in message.items():
                if key != "role":
                    yield from ((message["role"], text) for text in _strings(value))
        yield from (("system", text) for text in _strings(list(self.tools)))


def dump(value: Any, *, sort_keys: bool = False) -> bytes:
    """Compact UTF-8 JSON. Raises UnicodeEncodeError on a lone surrogate."""
    return (_SORTED if sort_keys else _PLAIN).encode(value).encode()


_PLAIN, _SORTED = (
    json.JSONEncoder(
        ensure_ascii=False, allow_nan=False, sort_keys=sort_keys, separators=(",", ":")
    )
    for sort_keys in (False, True)
)


def json_digest(value: Any) -> str:
    """sha256 hex of a JSON value, whatever its key order."""
    return hashlib.sha256(dump(value, sort_keys=True)).hexdigest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
