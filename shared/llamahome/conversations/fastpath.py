"""Rows to ids and masks on the fast path: shapes instead of Jinja, tiktoken's core, no offsets.

Nothing here has to be trusted: :meth:`FastChat.prove` compares with ``ChatBase.tokenise`` before
the first use, and every row of a kind not worked out is left to it.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.bytelevel import ByteLevelCore
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.shaped import ByShape, values_of
from llamahome.conversations.shapes import Shape, Stretch
from llamahome.conversations.symbolic import Part, Texts
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
        self, ids: NDArray[np.int32], trained: NDArray[np.bool_], ranks: list[int],
        whole_stop: bool, chat: FastChat,
    ) -> None:  # fmt: skip
        self.ids, self.trained = ids, trained
        self._ranks, self._whole_stop, self._chat = ranks, whole_stop, chat

    def stop_is_trained(self, length: int | None = None) -> bool:
        """Whether, of the first ``length`` tokens, the last trained one is a control token."""
        if length is None or length >= len(self.ids):
            return self._whole_stop
        return self._chat.ends_with_stop(self._ranks, self.trained[:length])


@dataclasses.dataclass(frozen=True, slots=True)
class _Fixed:
    """Ranks that every row of a shape has, and which of them are trained, as [start, stop)."""

    ranks: list[int]
    trained: list[Span]


class _Shape:
    """A :class:`Shape` ready to run: neighbouring fixed pieces in one, texts numbered."""

    def __init__(self, shape: Shape, chat: FastChat) -> None:
        self._chat = chat
        self._stop = shape.stop_is_trained
        self._pieces: list[_Fixed | Stretch] = []
        for piece in shape.pieces:
            if isinstance(piece, Stretch):
                if any(isinstance(part, Part) for part in piece.parts):
                    self._pieces.append(piece)
                    continue
                texts = [str(part) for part in piece.parts]
                ranks = chat.encode("".join(texts))
                self._fix(ranks, [chat.covered(ranks, texts, span) for span in piece.trained])
            else:
                token, trained = piece
                self._fix([chat.rank_of(token.id)], [(0, 1)] if trained else [])

    def _fix(self, ranks: list[int], trained: list[Span]) -> None:
        if not self._pieces or not isinstance(self._pieces[-1], _Fixed):
            self._pieces.append(_Fixed([], []))
        fixed = self._pieces[-1]
        assert isinstance(fixed, _Fixed)
        at = len(fixed.ranks)
        fixed.ranks.extend(ranks)
        fixed.trained.extend((at + start, at + stop) for start, stop in trained)

    def run(self, texts: Texts) -> FastRow | None:
        chat = self._chat
        ranks: list[int] = []
        spans: list[Span] = []
        for piece in self._pieces:
            at = len(ranks)
            if isinstance(piece, _Fixed):
                ranks += piece.ranks
                spans += [(at + start, at + stop) for start, stop in piece.trained]
                continue
            values = values_of(piece, texts)
            if values is None:
                return None
            text = "".join(values)
            if not chat.can_encode(text):
                return None
            found = chat.encode(text)
            ranks += found
            for span in piece.trained:
                start, stop = chat.covered(found, values, span)
                spans.append((at + start, at + stop))
        trained = np.zeros(len(ranks), dtype=np.bool_)
        for start, stop in spans:
            trained[start:stop] = True
        ids = chat.ids[np.array(ranks, dtype=np.int32)]
        return FastRow(ids, trained, ranks, self._stop, chat)


class FastChat(ByShape[_Shape, FastRow]):
    """The fast path of one base."""

    def __init__(self, base: ChatBase) -> None:
        """Raises NotByteLevel with the reason where there is no fast path."""
        super().__init__(base)
        core, added = base.tokenizer.byte_level(), base.tokenizer.added
        self._core: ByteLevelCore = core
        # Added tokens get the ranks after the core's.
        self._ranks = {token.id: len(core.ids) + place for place, token in enumerate(added)}
        self.ids = np.concatenate([core.ids, np.array([t.id for t in added], dtype=np.int32)])
        self.largest_id = int(self.ids.max())
        self._lengths = core.lengths
        self._spelled = core.spelled + [token.text.encode() for token in added]
        control = {token.id for token in added if token.text in base.control.tokens}
        self._control_ranks = frozenset(self._ranks[id] for id in control)

    def ready(self, shape: Shape) -> _Shape:
        return _Shape(shape, self)

    def run(self, ready: _Shape, texts: Texts) -> FastRow | None:
        return ready.run(texts)

    def rank_of(self, id: int) -> int:
        return self._ranks[id]

    def can_encode(self, text: str) -> bool:
        """Whether the core gives of this stretch what the tokenizer does."""
        if self.added.occur_in(text):
            return False
        if text.isascii() or not self._core.composed:
            return True
        return unicodedata.is_normalized("NFC", text) and not _NEWLY_COMPOSED.search(text)

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text)

    def covered(self, ranks: list[int], values: Sequence[str], span: Span) -> Span:
        """The tokens [start, stop) that share a byte with the parts [first, stop) of a stretch."""
        first, last = span
        start, stop = 0, len(ranks)
        if first:
            before = sum(len(value.encode()) for value in values[:first])
            end = self._lengths[ranks[0]]
            while end <= before:
                start += 1
                end += self._lengths[ranks[start]]
        if last < len(values):
            after = sum(len(value.encode()) for value in values[last:])
            begin = 0
            while begin + self._lengths[ranks[stop - 1]] <= after:
                stop -= 1
                begin += self._lengths[ranks[stop]]
        return start, stop

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
