"""Rows by their shapes: the chat template is worked out once for all rows of a shape.

Two ways run a shape: ``fastpath`` on tiktoken's core, and :class:`ShapedChat` here, for every other
tokenizer, on the ``tokenizers`` library with its offsets.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from tokenizers import Encoding

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
RAW_TEXT = (0, "text")  # its place among a row's texts
_ShapeKey: TypeAlias = tuple[str, tuple[tuple[str, object], ...]]
_Row = TypeVar("_Row")
_Ready = TypeVar("_Ready")


class ByShape(ABC, Generic[_Ready, _Row]):
    """Finds a row's shape and runs it. Threads may share it.

    ``largest_id``: no token it gives has a larger id; None where it does not know. ``refusal`` says
    why the last row that needed a new shape was left to the slow path. ``text_shape`` is that of
    raw text; None where it is left to the slow path.
    """

    largest_id: int | None = None
    text_shape: Shape | None = None

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
    def run(self, rows: Sequence[tuple[_Ready, Texts]]) -> list[_Row | None]:
        """Rows with these texts; None for one that is left to the slow path."""

    def tokenise(self, conversation: Conversation, *, loss_scope: str) -> _Row | None:
        """The row, or None where it is left to the slow path."""
        return self.tokenise_all([conversation], loss_scope=loss_scope)[0]

    def tokenise_all(
        self, conversations: Sequence[Conversation], *, loss_scope: str
    ) -> list[_Row | None]:
        """As :meth:`tokenise`, several at once, which is faster."""
        found: list[_Row | None] = [None] * len(conversations)
        places: list[int] = []
        rows: list[tuple[_Ready, Texts]] = []
        for place, conversation in enumerate(conversations):
            texts = self._texts(conversation)
            if texts is None:
                continue
            with self._lock:
                ready = self._ready(conversation, texts, loss_scope)
            if ready is not None:
                places.append(place)
                rows.append((ready, texts))
        for place, row in zip(places, self.run(rows), strict=True):
            found[place] = row
        return found

    def _texts(self, conversation: Conversation) -> Texts | None:
        """The contents; None where there is more to the row, or a text is like a control token."""
        if conversation.text is not None:
            taken = self.text_shape is not None and conversation.weight == 1
            return {RAW_TEXT: conversation.text} if taken else None
        if conversation.tools:
            return None
        texts = {}
        for number, message in enumerate(conversation.messages):
            content = message.get("content")
            if not isinstance(content, str) or not (len(message) == 2 or message.keys() <= _KEYS):
                return None
            texts[number, "content"] = content
        control = self.base.control
        if not control.is_far_from("\0".join(texts.values())):
            for message in conversation.messages:
                if control.touches(message["role"], message["content"]):
                    return None
        return texts

    def _ready(self, conversation: Conversation, texts: Texts, loss_scope: str) -> _Ready | None:
        key = (loss_scope, tuple((m["role"], m.get("weight", 1)) for m in conversation.messages))
        known = self._shapes.setdefault(key, [])
        self._shapes.move_to_end(key)
        for shape, ready in known:
            if shape.holds_for(texts):
                return ready
        try:
            shape = self._shape_of(conversation, loss_scope)
            known.append((shape, self.ready(shape)))
        except (Untraceable, TemplateRefused, Dropped) as error:
            self.refusal = str(error)
            return None
        if len(known) > _VARIANTS:
            del known[0]
        if len(self._shapes) > _SHAPES:
            self._shapes.popitem(last=False)
        return known[-1][1]

    def _shape_of(self, conversation: Conversation, loss_scope: str) -> Shape:
        if conversation.text is not None:
            assert self.text_shape is not None, "or the text would be left to the slow path"
            return self.text_shape
        base = self.base
        return shape_of(conversation, base.template, self.added, base.control.tokens, loss_scope)


def is_blank(text: str) -> bool:
    """Where an answer ends was worked out for texts that are not."""
    return not text or text.isspace()


class ShapedChat(ByShape[Shape, Tokenised]):
    """The template once for a shape, the base's own tokenizer for each row."""

    def ready(self, shape: Shape) -> Shape:
        return shape

    def run(self, rows: Sequence[tuple[Shape, Texts]]) -> list[Tokenised | None]:
        filled = [self._filled(ready, texts) for ready, texts in rows]
        taken = [row for row in filled if row is not None]
        encodings = iter(self.base.tokenizer.encode_batch([text for text, _ in taken]))
        return [row and self._encoded(*row, next(encodings)) for row in filled]

    def _filled(self, ready: Shape, texts: Texts) -> tuple[str, list[Span]] | None:
        """What the template writes for a row, and its trained characters."""
        pieces: list[str] = []
        spans: list[Span] = []
        at = 0
        for piece in ready.pieces:
            if not isinstance(piece, Stretch):
                token, trained = piece
                values = [token.text]
                covered = _WHOLE if trained else ()
            else:
                values = []
                for part in piece.parts:
                    value = part if isinstance(part, str) else value_of(part, texts)
                    if isinstance(part, Part) and is_blank(value):
                        return None
                    values.append(value)
                if self.added.occur_in("".join(values)):
                    return None
                covered = piece.trained
            edges = [at]
            for value in values:
                at += len(value)
                edges.append(at)
            spans += [(edges[first], edges[stop]) for first, stop in covered]
            pieces += values
        return "".join(pieces), spans

    def _encoded(self, text: str, spans: list[Span], encoding: Encoding) -> Tokenised:
        # A flat array at once: one of pairs takes as long as a fifth of the encoding.
        offsets = np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.int64)
        encoded = self.base.encoded(text, encoding.ids, offsets)
        return Tokenised(
            text=text, ids=encoded.ids, trained=mask_of(spans, encoded), starts=encoded.starts,
            ends=encoded.ends, control=encoded.control, agreed=True,
        )  # fmt: skip
