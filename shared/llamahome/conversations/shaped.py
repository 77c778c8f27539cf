"""Rows by their shapes: the chat template is worked out once for all rows of a shape.

Two ways run a shape: ``fastpath`` on tiktoken's core, and :class:`ShapedChat` here, for every other
tokenizer, on the ``tokenizers`` library with its offsets.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from llamahome.conversations.chat import ChatBase, Tokenised
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.masks import Dropped, mask_of
from llamahome.conversations.shapes import AddedTokens, Shape, Stretch, shape_of
from llamahome.conversations.symbolic import Part, Texts, Untraceable, value_of
from llamahome.conversations.templates import Span, TemplateRefused

_SHAPES = 512  # in memory at once; the least lately used are worked out again
_VARIANTS = 16  # of one shape, told apart by their guards
_WHOLE: tuple[Span, ...] = ((0, 1),)
_KEYS = {"role", "content", "weight"}
_ShapeKey: TypeAlias = tuple[str, tuple[tuple[str, object], ...]]
_Row = TypeVar("_Row")
_Ready = TypeVar("_Ready")


class ByShape(ABC, Generic[_Ready, _Row]):
    """Finds a row's shape and runs it. Threads may share it.

    ``largest_id``: no token it gives has a larger id; None where it does not know. ``refusal`` says
    why the last row that needed a new shape was left to the slow path.
    """

    largest_id: int | None = None

    def __init__(self, base: ChatBase) -> None:
        self.base = base
        self.added = AddedTokens(base.tokenizer.added)
        self.refusal: str | None = None
        self._shapes: OrderedDict[_ShapeKey, list[tuple[Shape, _Ready]]] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def ready(self, shape: Shape) -> _Ready:
        """What is kept of a shape."""

    @abstractmethod
    def run(self, ready: _Ready, texts: Texts) -> _Row | None:
        """The row with these texts; None where it is left to the slow path."""

    def tokenise(self, conversation: Conversation, *, loss_scope: str) -> _Row | None:
        """The row, or None where it is left to the slow path."""
        if conversation.tools:
            return None
        control = self.base.control
        texts = {}
        for number, message in enumerate(conversation.messages):
            content = message.get("content")
            if not isinstance(content, str) or not message.keys() <= _KEYS:
                return None
            if control.touches(message["role"], content):
                return None
            texts[number, "content"] = content
        with self._lock:
            ready = self._ready(conversation, texts, loss_scope)
        return None if ready is None else self.run(ready, texts)

    def _ready(self, conversation: Conversation, texts: Texts, loss_scope: str) -> _Ready | None:
        key = (loss_scope, tuple((m["role"], m.get("weight", 1)) for m in conversation.messages))
        known = self._shapes.setdefault(key, [])
        self._shapes.move_to_end(key)
        for shape, ready in known:
            if shape.holds_for(texts):
                return ready
        try:
            shape = shape_of(
                conversation, self.base.template, self.added, self.base.control.tokens, loss_scope
            )
        except (Untraceable, TemplateRefused, Dropped) as error:
            self.refusal = str(error)
            return None
        known.append((shape, self.ready(shape)))
        if len(known) > _VARIANTS:
            del known[0]
        if len(self._shapes) > _SHAPES:
            self._shapes.popitem(last=False)
        return known[-1][1]


def values_of(stretch: Stretch, texts: Texts) -> list[str] | None:
    """What the stretch's parts are in a row; None where one is blank.

    Where an answer ends was worked out for texts that are not.
    """
    values = []
    for part in stretch.parts:
        value = part if isinstance(part, str) else value_of(part, texts)
        if isinstance(part, Part) and (not value or value.isspace()):
            return None
        values.append(value)
    return values


class ShapedChat(ByShape[Shape, Tokenised]):
    """The template once for a shape, the base's own tokenizer for each row."""

    def ready(self, shape: Shape) -> Shape:
        return shape

    def run(self, ready: Shape, texts: Texts) -> Tokenised | None:
        pieces: list[str] = []
        spans: list[Span] = []
        at = 0
        for piece in ready.pieces:
            if not isinstance(piece, Stretch):
                token, trained = piece
                values = [token.text]
                covered = _WHOLE if trained else ()
            else:
                found = values_of(piece, texts)
                if found is None or self.added.occur_in("".join(found)):
                    return None
                values, covered = found, piece.trained
            edges = [at]
            for value in values:
                at += len(value)
                edges.append(at)
            spans += [(edges[first], edges[stop]) for first, stop in covered]
            pieces += values
        return self._encoded("".join(pieces), spans)

    def _encoded(self, text: str, spans: list[Span]) -> Tokenised:
        encoding = self.base.tokenizer.encode(text)
        encoded = self.base.encoded(text, encoding.ids, np.array(encoding.offsets))
        return Tokenised(
            text=text, ids=encoded.ids, trained=mask_of(spans, encoded), starts=encoded.starts,
            ends=encoded.ends, control=encoded.control, agreed=True,
        )  # fmt: skip
