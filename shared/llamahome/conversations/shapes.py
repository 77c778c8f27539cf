"""What a chat template makes of one shape of conversation, worked out once for all of its rows.

The template is followed (``symbolic``) for the first row of a shape; what it wrote is cut at the
added tokens, where every tokenizer cuts too, into stretches. Stretches without text of the row are
encoded once. In the others the row's text is put in and encoded with what the template wrote
beside it, so that merges across such a seam come out as they should.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.agreement import (
    disagreement,
    symbolic_places,
    texts_of,
    trained_messages,
)
from llamahome.conversations.control import any_of
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.masks import Dropped, Encoded, stop_is_trained, trained_tokens
from llamahome.conversations.symbolic import Guard, Part, Texts, Trace, Untraceable
from llamahome.conversations.templates import ChatTemplate, Rendered, Span
from llamahome.conversations.tokenizer import AddedName


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """Parts between two added tokens, and which of them are trained, as [first, stop) of parts."""

    parts: tuple[str | Part, ...]
    trained: tuple[Span, ...]


Piece: TypeAlias = "Stretch | tuple[AddedName, bool]"


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Added tokens (each trained or not) and stretches, valid for rows on which ``guards`` hold."""

    guards: tuple[Guard, ...]
    pieces: tuple[Piece, ...]
    stop_is_trained: bool

    def holds_for(self, texts: Texts) -> bool:
        """Whether the row with these texts is of it."""
        return all(guard.holds(texts) for guard in self.guards)


class AddedTokens:
    """Finds a tokenizer's added tokens in text: the plain ones first, then the normalized."""

    def __init__(self, added: Iterable[AddedName]) -> None:
        self._named = {token.text: token for token in added}
        rounds: list[list[str]] = [[], []]
        for token in self._named.values():
            rounds[token.normalized].append(token.text)
        self._rounds = [any_of(texts) for texts in rounds if texts]
        self._starts = {text[:1] for text in self._named}

    def occur_in(self, text: str) -> bool:
        """Whether any does."""
        for start in self._starts:
            if start in text:
                return any(found.search(text) for found in self._rounds)
        return False

    def cut(self, text: str) -> Iterator[tuple[str, AddedName | None]]:
        """The text in pieces, those that are added tokens with their token."""
        pieces: list[tuple[str, AddedName | None]] = [(text, None)]
        for pattern in self._rounds:
            pieces = [
                cut for piece in pieces
                for cut in ([piece] if piece[1] else self._cut(pattern, piece[0]))
            ]  # fmt: skip
        return iter(pieces)

    def _cut(
        self, pattern: re.Pattern[str], text: str
    ) -> Iterator[tuple[str, AddedName | None]]:  # fmt: skip
        last = 0
        for match in pattern.finditer(text):
            if match.start() > last:
                yield text[last : match.start()], None
            yield match[0], self._named[match[0]]
            last = match.end()
        if last < len(text):
            yield text[last:], None


@dataclasses.dataclass(frozen=True, slots=True)
class _Following:
    """A template as ``masks`` asks it, answering in private characters."""

    template: ChatTemplate
    trace: Trace

    @property
    def marks_generations(self) -> bool:
        return self.template.marks_generations

    def render(
        self, conversation: Conversation, *, turns: int | None = None, prompt: bool = False
    ) -> Rendered:
        return self.template.follow(conversation, self.trace, turns=turns, prompt=prompt)


def shape_of(
    conversation: Conversation,
    template: ChatTemplate,
    added: AddedTokens,
    control: frozenset[str],
    loss_scope: str,
) -> Shape:
    """The shape of a row. Raises Untraceable, TemplateRefused, and Dropped."""
    trace = Trace(texts_of(conversation))
    following = _Following(template, trace)
    rendered = following.render(conversation)
    cut = list(added.cut(rendered.text))
    if any(token is not None and not token.plain for _, token in cut):
        raise Untraceable("the template writes an added token that takes its neighbours' spaces")
    encoded = _by_characters(cut, rendered.text, control)
    if loss_scope == "all" and len(conversation.trained_turns("all")) < len(
        conversation.assistant_turns()
    ):
        raise Untraceable("turns are taken out of the loss on everything")
    mask = trained_tokens(conversation, following, rendered, encoded, loss_scope)
    _closings_are_sure(rendered, encoded)
    places = symbolic_places(rendered.text, trace, trained_messages(conversation, loss_scope))
    if places is None:
        raise Untraceable("a trained message has no text of its own")
    if wrong := disagreement(places, mask, encoded, whole=loss_scope == "all"):
        raise Dropped("mask_disagreement", wrong)
    whole = np.repeat(mask, encoded.ends - encoded.starts)
    return Shape(
        guards=tuple(trace.guards),
        pieces=tuple(_pieces(cut, whole, trace)),
        stop_is_trained=stop_is_trained(rendered.text, _Masked(encoded, mask)),
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Masked:
    encoded: Encoded
    trained: NDArray[np.bool_]

    @property
    def starts(self) -> NDArray[np.int64]:
        return self.encoded.starts

    @property
    def ends(self) -> NDArray[np.int64]:
        return self.encoded.ends

    @property
    def control(self) -> NDArray[np.bool_]:
        return self.encoded.control


def _by_characters(
    cut: Sequence[tuple[str, AddedName | None]], text: str, control: frozenset[str]
) -> Encoded:
    """The text as if every character were a token, and every added token one."""
    sizes, ids, flags = [], [], []
    for piece, token in cut:
        sizes += [len(piece)] if token else [1] * len(piece)
        ids += [token.id] if token else [-1] * len(piece)
        flags += [token.text in control] if token else [False] * len(piece)
    ends = np.cumsum(sizes, dtype=np.int64)
    return Encoded(
        text=text, ids=np.array(ids, dtype=np.int32), starts=ends - sizes, ends=ends,
        control=np.array(flags, dtype=np.bool_),
    )  # fmt: skip


def _closings_are_sure(rendered: Rendered, encoded: Encoded) -> None:
    """Where an answer's closing run is found must not hang on how real tokens fall."""
    for start, end in rendered.generations:
        if start == end:
            raise Untraceable("a generation block is empty")
        first = int(np.searchsorted(encoded.starts, end, side="left"))
        controls = np.flatnonzero(encoded.control[first:])
        between = encoded.text[end : int(encoded.starts[first + controls[0]])] if len(
            controls) else ""  # fmt: skip
        if between.strip():
            raise Untraceable("something stands between an answer and its closing token")


def _pieces(
    cut: Sequence[tuple[str, AddedName | None]], trained: NDArray[np.bool_], trace: Trace
) -> Iterator[Piece]:
    at = 0
    for text, token in cut:
        mask = trained[at : at + len(text)]
        at += len(text)
        yield (token, bool(mask[0])) if token else _stretch(text, mask, trace)


def _stretch(text: str, trained: NDArray[np.bool_], trace: Trace) -> Stretch:
    """Cut where the row's texts stand and where the mask changes."""
    parts: list[str | Part] = []
    spans: list[Span] = []
    before, was = "", False
    for char, now in zip(text, trained.tolist(), strict=True):
        if now != was:
            if before:
                parts.append(before)
                before = ""
            spans += [(len(parts), len(parts))] if now else []
            was = now
        part = trace.part(char)
        if part is None:
            before += char
        else:
            parts += [before, part] if before else [part]
            before = ""
        if now:
            spans[-1] = spans[-1][0], len(parts) + bool(before)
    if before:
        parts.append(before)
    return Stretch(tuple(parts), tuple(spans))
