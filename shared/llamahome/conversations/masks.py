"""Which tokens are trained. Decided here, once, and stored with the ids.

An answer is what the model itself would have to write: the ``{% generation %}`` blocks of a
template that has them; otherwise what stands in the rendered text between the prompt with the
generation prompt and the end of the turn (prefix differences). A token that overlaps an answer's
first or last character belongs to it, and the closing run of control tokens is trained, or the
model would never learn to stop. What follows that run, and all that others wrote, is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.conversation import Conversation
from llamahome.conversations.templates import Rendered, Span, TemplateRefused


class Dropped(Exception):
    """A row that cannot be trained on: a stable ``code`` (counted) and a ``reason`` (shown)."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Encoded(NamedTuple):
    """A rendered text as n tokens; ``starts`` and ``ends`` are characters of ``text``."""

    text: str
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    control: NDArray[np.bool_]


class Template(Protocol):
    """What is asked of a chat template here; ``templates.ChatTemplate`` is one."""

    @property
    def marks_generations(self) -> bool: ...
    def render(
        self, conversation: Conversation, *, turns: int | None = None, prompt: bool = False
    ) -> Rendered: ...


class _Masked(Protocol):
    @property
    def trained(self) -> NDArray[np.bool_]: ...
    @property
    def starts(self) -> NDArray[np.int64]: ...
    @property
    def ends(self) -> NDArray[np.int64]: ...
    @property
    def control(self) -> NDArray[np.bool_]: ...


def trained_tokens(
    conversation: Conversation,
    template: Template,
    rendered: Rendered,
    encoded: Encoded,
    loss_scope: str,
) -> NDArray[np.bool_]:
    """bool [n]. ``loss_scope`` is assistant, last or all. Raises Dropped (does not nest)."""
    turns = conversation.assistant_turns()
    wanted = conversation.trained_turns(loss_scope)
    if loss_scope == "all":
        removed = sorted(set(turns) - wanted)
        mask = np.ones(len(encoded.ids), dtype=np.bool_)
        if removed:
            mask &= ~mask_of(_answers(conversation, template, rendered, encoded, removed), encoded)
        return mask
    if not wanted:
        return np.zeros(len(encoded.ids), dtype=np.bool_)
    return mask_of(_answers(conversation, template, rendered, encoded, sorted(wanted)), encoded)


def stop_is_trained(text: str, row: _Masked, length: int | None = None) -> bool:
    """Whether the last trained token, white space aside, is a control token."""
    places = np.flatnonzero(row.trained[:length])
    for place in places[::-1]:
        if row.control[place]:
            return True
        if not text[row.starts[place] : row.ends[place]].isspace():
            return False
    return False


def _answers(
    conversation: Conversation,
    template: Template,
    rendered: Rendered,
    encoded: Encoded,
    turns: Sequence[int],
) -> list[Span]:
    """Character spans of the answers in messages ``turns``, each with its closing run."""
    if not template.marks_generations:
        return [
            _cut_after_closing(_turn(conversation, template, rendered.text, turn), encoded)
            for turn in turns
        ]
    spans = [_with_closing(span, encoded, None) for span in rendered.generations[-1:]]
    closing = _closing_ids(rendered.generations[-1], spans[0], encoded) if spans else []
    spans = [_with_closing(span, encoded, closing) for span in rendered.generations[:-1]] + spans
    every = conversation.assistant_turns()
    if set(turns) == set(every):
        return spans
    if len(spans) == len(every):
        return [span for turn, span in zip(every, spans, strict=True) if turn in turns]
    wanted = [_turn(conversation, template, rendered.text, turn) for turn in turns]
    return [span for span in spans if any(a <= span[0] < b for a, b in wanted)]


def _turn(conversation: Conversation, template: Template, text: str, turn: int) -> Span:
    """Characters of message ``turn``, from the end of the prompt to the end of the turn."""
    last = turn == len(conversation.messages) - 1
    try:
        before = template.render(conversation, turns=turn, prompt=True).text
        after = text if last else template.render(conversation, turns=turn + 1).text
    except TemplateRefused as refused:
        raise _does_not_nest(turn, f"the template says: {refused}") from None
    if not text.startswith(before):
        raise _does_not_nest(turn, "its prompt is not how the whole text starts")
    if not text.startswith(after) or len(after) < len(before):
        raise _does_not_nest(turn, "the text up to its end is not how the whole text starts")
    return len(before), len(after)


def _does_not_nest(turn: int, why: str) -> Dropped:
    return Dropped(
        "template_does_not_nest",
        f"message {turn}: {why}, so the answer cannot be told from the prompt; add generation tags "
        "to the base's chat template, or set loss_scope to last or all",
    )


def _cut_after_closing(span: Span, encoded: Encoded) -> Span:
    """The span without the white space after its closing run; as it is where there is no run."""
    tokens = _overlapping(span, encoded)
    for token in reversed(tokens):
        if encoded.control[token]:
            return span[0], int(encoded.ends[token])
        if not _is_space(token, encoded, span[1]):
            break
    return span


def _with_closing(span: Span, encoded: Encoded, closing: Sequence[int] | None) -> Span:
    """The span and the run of control tokens right after it, unless the span ends with one.

    ``closing`` limits the run to the ids that close the last turn, so that the opening of the next
    turn is never taken for the end of this one.
    """
    tokens = _overlapping(span, encoded)
    for token in reversed(tokens):
        if encoded.control[token]:
            return span
        if not _is_space(token, encoded, span[1]):
            break
    end, follows = span[1], 0
    for token in range(tokens.stop, len(encoded.ids)):
        if encoded.control[token]:
            if closing is not None and encoded.ids[token] not in closing[follows : follows + 1]:
                break
            end, follows = int(encoded.ends[token]), follows + 1
        elif follows or not _is_space(token, encoded):
            break
    return span[0], end


def _closing_ids(block: Span, whole: Span, encoded: Encoded) -> list[int]:
    tokens = _overlapping((block[1], whole[1]), encoded)
    return [int(encoded.ids[token]) for token in tokens if encoded.control[token]]


def _overlapping(span: Span, encoded: Encoded) -> range:
    """Tokens that share at least one character with ``span``; offsets only ever grow."""
    if span[0] >= span[1]:
        at = int(np.searchsorted(encoded.starts, span[0], side="left"))
        return range(at, at)
    first = int(np.searchsorted(encoded.ends, span[0], side="right"))
    stop = int(np.searchsorted(encoded.starts, span[1], side="left"))
    return range(first, max(first, stop))


def _is_space(token: int, encoded: Encoded, end: int | None = None) -> bool:
    """Whether what the token covers, up to ``end`` if it reaches further, is white space."""
    stop = int(encoded.ends[token])
    return encoded.text[encoded.starts[token] : stop if end is None else min(stop, end)].isspace()


def mask_of(spans: Iterable[Span], encoded: Encoded) -> NDArray[np.bool_]:
    """bool [n]: the tokens that share a character with a span."""
    mask = np.zeros(len(encoded.ids), dtype=np.bool_)
    for span in spans:
        tokens = _overlapping(span, encoded)
        mask[tokens.start : tokens.stop] = True
    return mask
