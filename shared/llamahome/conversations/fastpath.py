"""Rows to ids and masks on the fast path: shapes instead of Jinja, tiktoken's core, no offsets.

Nothing here has to be trusted: :meth:`FastChat.prove` compares with ``ChatBase.tokenise`` before
the first use, and every row of a kind not worked out is left to it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.bytelevel import SEAM, ByteLevelCore
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.shaped import RAW_TEXT, ByShape, is_blank
from llamahome.conversations.shapes import Shape, Stretch
from llamahome.conversations.symbolic import Part, Texts, Untraceable, value_of
from llamahome.conversations.templates import Span

# Blocks of Unicode 16 with compositions that Python's tables may not know yet.
_NEWLY_COMPOSED = re.compile(
    "[\U000105c0-\U000105ff\U00011380-\U000113ff\U00016100-\U0001613f\U00016d40-\U00016d7f]"
)


class FastRow:
    """One row: ``ids`` int32 [n], ``trained`` bool [n], before any truncation."""

    # No dataclass: one is made for every row, and setting frozen fields shows in the profile.
    __slots__ = ("_chat", "_ranks", "_whole_stop", "ids", "trained")
    neutralised = 0
    agreed = True  # its shape's mask was derived twice

    def __init__(
        self, ids: NDArray[np.int32], trained: NDArray[np.bool_], ranks: NDArray[np.intp],
        whole_stop: bool, chat: FastChat,
    ) -> None:  # fmt: skip
        self.ids, self.trained = ids, trained
        self._ranks, self._whole_stop, self._chat = ranks, whole_stop, chat

    def stop_is_trained(self, length: int | None = None) -> bool:
        """Whether, of the first ``length`` tokens, the last trained one is a control token."""
        if length is None or length >= len(self.ids):
            return self._whole_stop
        return self._chat.ends_with_stop(self._ranks.tolist(), self.trained[:length])


class _Shape:
    """A :class:`Shape` ready to be filled: fixed text around slots, added tokens as seams.

    ``marks`` are the added tokens' ranks in order, ``stop_is_trained`` the whole row's. A row
    starts with a seam of its own, so that it can stand behind another one.
    """

    def __init__(self, shape: Shape, chat: FastChat) -> None:
        """Raises Untraceable."""
        self.stop_is_trained = shape.stop_is_trained
        self._slots: list[Part] = []
        self._pieces = [SEAM]  # fixed, slot, fixed, slot, ..., fixed
        marks = [chat.seam]
        # Places as (slots before, bytes of fixed text before).
        self._trained: list[tuple[tuple[int, int], tuple[int, int]]] = []
        for piece in shape.pieces:
            if isinstance(piece, Stretch):
                edges = [self._place()]
                for part in piece.parts:
                    self._add(part)
                    edges.append(self._place())
                self._trained += [(edges[first], edges[stop]) for first, stop in piece.trained]
            else:
                token, trained = piece
                marks.append(chat.rank_of(token.id))
                before = self._place()
                self._pieces[-1] += SEAM
                self._trained += [(before, self._place())] if trained else []
        self.marks = np.array(marks, dtype=np.int32)
        _, self._fixed_bytes = self._place()

    def _add(self, part: str | Part) -> None:
        if isinstance(part, Part):
            self._slots.append(part)
            self._pieces += ["", ""]
        elif SEAM in part:
            raise Untraceable("the template writes a NUL character")
        else:
            self._pieces[-1] += part

    def _place(self) -> tuple[int, int]:
        return len(self._slots), sum(len(piece.encode()) for piece in self._pieces)

    def filled(self, texts: Texts) -> _Filled | None:
        """A row's text; None where one of its texts is blank or holds a seam."""
        values = [value_of(slot, texts) for slot in self._slots]
        before, size = [0], 0
        for value in values:
            if is_blank(value):
                return None
            size += len(value) if value.isascii() else len(value.encode())
            before.append(size)
        pieces = self._pieces.copy()
        pieces[1::2] = values
        text = "".join(pieces)
        if text.count(SEAM) != len(self.marks):
            return None
        spans = [(before[a] + b, before[c] + d) for (a, b), (c, d) in self._trained]
        return _Filled(self, text, size + self._fixed_bytes, spans)


class _Filled(NamedTuple):
    """A row's text, its UTF-8 bytes, and which of them are trained, as [start, stop)."""

    shape: _Shape
    text: str
    bytes: int
    trained: list[Span]


class FastChat(ByShape[_Shape, FastRow]):
    """The fast path of one base."""

    def __init__(self, base: ChatBase) -> None:
        """Raises NotByteLevel with the reason where there is no fast path."""
        super().__init__(base)
        core, added = base.tokenizer.byte_level(), base.tokenizer.added
        self._core: ByteLevelCore = core
        self.seam = core.seam
        # Added tokens get the ranks after the core's.
        self._ranks = {token.id: len(core.ids) + place for place, token in enumerate(added)}
        self._ids = np.concatenate([core.ids, np.array([t.id for t in added], dtype=np.int32)])
        self.largest_id = int(self._ids.max())
        self._spelled = core.spelled + [token.text.encode() for token in added]
        control = {token.id for token in added if token.text in base.control.tokens}
        self._control_ranks = frozenset(self._ranks[id] for id in control)
        self.text_shape = _text_shape(base)

    def ready(self, shape: Shape) -> _Shape:
        return _Shape(shape, self)

    def run(self, rows: Sequence[tuple[_Shape, Texts]]) -> list[FastRow | None]:
        found: list[FastRow | None] = [None] * len(rows)
        taken: dict[int, _Filled] = {}
        for place, (ready, texts) in enumerate(rows):
            row = ready.filled(texts)
            if row is not None and self.can_encode(row.text):
                taken[place] = row
        encoded = self._encoded([*taken.values()])
        if encoded is None:  # because of some of them: which?
            alone = (self._encoded([row]) for row in taken.values())
            encoded = [one[0] if one else None for one in alone]
        for place, done in zip(taken, encoded, strict=True):
            found[place] = done
        return found

    def rank_of(self, id: int) -> int:
        return self._ranks[id]

    def can_encode(self, text: str) -> bool:
        """Whether the core gives of these stretches what the tokenizer does."""
        if self.added.occur_in(text):
            return False
        if text.isascii() or not self._core.composed:
            return True
        return unicodedata.is_normalized("NFC", text) and not _NEWLY_COMPOSED.search(text)

    def _encoded(self, rows: Sequence[_Filled]) -> list[FastRow | None] | None:
        """All rows in one call; None where the tokens do not cover their bytes."""
        if not rows:
            return []
        # As wide as an index is, for it is one several times.
        ranks = self._core.encode_stretches("".join([row.text for row in rows])).astype(np.intp)
        seams = np.flatnonzero(ranks == self.seam)
        marks = np.concatenate([row.shape.marks for row in rows])
        ends = self._core.lengths.take(ranks).cumsum()
        if len(seams) != len(marks) or ends[-1] != sum([row.bytes for row in rows]):
            return None
        ranks[seams] = marks
        ids, trained = self._ids.take(ranks), _covered(rows, ends)
        edges = [*seams.tolist(), len(ranks)]
        result: list[FastRow | None] = []
        seam = 0
        for row in rows:
            # Its own seam is none of its tokens.
            start, seam = edges[seam] + 1, seam + len(row.shape.marks)
            here = slice(start, edges[seam])
            stop = row.shape.stop_is_trained
            result.append(FastRow(ids[here], trained[here], ranks[here], stop, self))
        return result

    def ends_with_stop(self, ranks: list[int], trained: NDArray[np.bool_]) -> bool:
        """As ``masks.stop_is_trained``, from the tokens' bytes."""
        for place in np.flatnonzero(trained)[::-1].tolist():
            if ranks[place] in self._control_ranks:
                return True
            if not self._characters(ranks, place).isspace():
                return False
        return False

    def _characters(self, ranks: list[int], place: int) -> str:
        """The whole characters of which the token at ``place`` has at least one byte."""
        pieces = [self._spelled[rank] for rank in ranks[max(0, place - 3) : place + 4]]
        at = sum(map(len, pieces[: min(3, place)]))
        text, end = b"".join(pieces), at + len(self._spelled[ranks[place]])
        while text[at] & 0xC0 == 0x80:
            at -= 1
        while end < len(text) and text[end] & 0xC0 == 0x80:
            end += 1
        return text[at:end].decode()


def _text_shape(base: ChatBase) -> Shape | None:
    """Raw text and what stands around it; None where that is no added token."""
    added = {token.id: token for token in base.tokenizer.added}
    before, after = base.tokenizer.around
    if not added.keys() >= {*before, *after}:
        return None
    text = Stretch((Part(*RAW_TEXT),), ((0, 1),))
    first, last = [(added[id], False) for id in before], [(added[id], True) for id in after]
    return Shape((), (*first, text, *last), stop_is_trained=bool(after))


def _covered(rows: Sequence[_Filled], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Bool [n]: the tokens that share a byte with a trained span of the rows.

    ``ends`` int64 [n] are the tokens' ends in bytes.
    """
    starts: list[int] = []
    stops: list[int] = []
    at = 0
    for row in rows:
        for start, stop in row.trained:
            starts.append(at + start)
            stops.append(at + stop)
        at += row.bytes
    first = ends.searchsorted(np.array(starts, dtype=np.int64), side="right")
    last = ends.searchsorted(np.array(stops, dtype=np.int64), side="left")
    trained = np.zeros(len(ends), dtype=np.bool_)
    for start, stop in zip(first.tolist(), (last + 1).tolist(), strict=True):
        trained[start:stop] = True
    return trained
