"""Which way a shard's rows take to ids and masks, with its proof on the job's own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase, Tokenised
from llamahome.conversations.fastpath import FastChat, FastRow
from llamahome.conversations.masks import Dropped
from llamahome.conversations.proof import FIRST_ROWS, difference, sampled
from llamahome.conversations.shaped import ShapedChat

FAST, SHAPES, TEMPLATE = "fast", "shapes", "template"


class Unproven(Exception):
    """The fast path gave another answer than the slow one: it is not to be used for this base."""


class RowPath:
    """Rows to ids and masks, the fast way where it was proven; compared on a sample all along."""

    def __init__(
        self,
        slow: ChatBase,
        fast: FastChat | ShapedChat | None,
        *,
        loss_scope: str,
        reason: str = "",
    ) -> None:
        """``reason`` says why there is no faster way."""
        self._slow, self._fast = slow, fast
        self._scope = loss_scope
        self._taken = 0
        self.reason = reason
        # No id of the fast way is larger; None where that is not known.
        self.largest_id = fast.largest_id if fast else None
        way = TEMPLATE if fast is None else SHAPES
        self.name = FAST if isinstance(fast, FastChat) else f"{way} ({reason})"

    def tokenise_all(
        self, rows: Sequence[Conversation], digests: Sequence[bytes]
    ) -> Iterator[tuple[Tokenised | FastRow | Dropped, bool]]:
        """The rows, or why one is dropped; and whether it went the slow way. Raises Unproven."""
        quick: Sequence[Tokenised | FastRow | None] = [None] * len(rows)
        if self._fast is not None:
            quick = self._fast.tokenise_all(rows, loss_scope=self._scope)
        for row, digest, found in zip(rows, digests, quick, strict=True):
            if found is None:
                yield self._slowly(row), True
                continue
            self._taken += 1
            if self._taken <= FIRST_ROWS or sampled(digest):
                self._compare(row, found)
            yield found, False

    def _slowly(self, row: Conversation) -> Tokenised | Dropped:
        try:
            return self._slow.tokenise(row, loss_scope=self._scope)
        except Dropped as dropped:
            return dropped

    def _compare(self, row: Conversation, found: FastRow | Tokenised) -> None:
        if why := difference(self._slow, row, found, loss_scope=self._scope):
            raise Unproven(why)
