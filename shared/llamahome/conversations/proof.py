"""The fast path against the slow one, before it is used and while it is.

A base's tokenizer and template are compared on a fixed set of difficult rows first, then on the
job's own: the first ones of every shard, and every row whose digest says so, which makes the sample
the same however the rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llamahome.conversations.chat import ChatBase, Tokenised
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.fastpath import FastChat, FastRow
from llamahome.conversations.masks import Dropped
from llamahome.conversations.shaped import ShapedChat

FIRST_ROWS = 8
_SAMPLE_BYTE = 0  # one row in 256
_NASTY = (
    "plain text", "  leading", "trailing  ", "\n\nnewlines\n\n", "\t\ttabs\t", "a\r\nb\rc", "x",
    "emoji 😀 👩\u200d👩\u200d👧 🇩🇪", "東京は日本の首都です。",
    "你好，世界！", "e\u0301\u0323 a\u030a ﬁ Å",
    "שלום مرحبا", "a" * 600, "word " * 60, "\u200bzero\u200dwidth", "NUL \0 and \x07 bell", "<",
    "<|", "|>", ">", "im_end|>", "[INST] no [/INST]", "<<SYS>>", "\u2581low\u2581line",
    "\u2028 separator", "> a quote\n> goes on", "1234567890", "...", "'s 't 're 'LL I'Ve",
    "\ufeffmark", "\u00a0no-break\u00a0", "\u3000wide\u3000", "if (a < b) {\n\n    return;\n}\n",
    "<think>\nhm\n</think>\n\nyes", "</think>", "a</think>b", "<|im_end|>", "</s>", "\x1c", "\x85a",
    "\n", " ", "a & b <i>\"q\"</i> 'p'", "{{ x }} {% y %}", "\\n \\u0041", "Ａ ﷺ ½ ²", "𝒳𝓎 𠮷",
)  # fmt: skip


def difficult_rows(control: Iterable[str]) -> Iterator[Conversation]:
    """Conversations of one to three rounds over the difficult texts, with the base's own tokens."""
    texts = [*_NASTY, *(f"a {token} b" for token in sorted(control)[:4])]
    for number, text in enumerate(texts):
        other, third = texts[number - 1], texts[(number * 7) % len(texts)]
        rounds = [(text, other), (other, text), (third, text)][: number % 3 + 1]
        messages: list[dict[str, Any]] = []
        if number % 2:
            messages.append({"role": "system", "content": third})
        for asked, answered in rounds:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        if number % 5 == 4:
            messages[-1]["weight"] = 0
        yield Conversation(tuple(messages))


def difficult_texts() -> Iterator[Conversation]:
    """The difficult texts as rows of raw text."""
    return (Conversation((), text=text) for text in _NASTY)


def sampled(digest: bytes) -> bool:
    """Whether the row of this digest is compared in every job that holds it."""
    return digest[-1] == _SAMPLE_BYTE


def difference(
    slow: ChatBase, row: Conversation, found: FastRow | Tokenised | None, *, loss_scope: str
) -> str | None:
    """How the fast path's answer differs from the slow one's; None where it does not, or gave none.

    The slow path refusing a row that the fast one takes is a difference.
    """
    if found is None:
        return None
    try:
        wanted = slow.tokenise(row, loss_scope=loss_scope)
    except Dropped as dropped:
        return f"the slow path drops a row: {dropped.code}"
    return _first_difference(wanted, found)


def _first_difference(wanted: Tokenised, found: FastRow | Tokenised) -> str | None:
    if len(wanted.ids) != len(found.ids):
        return f"{len(found.ids)} tokens where {len(wanted.ids)} belong"
    if not np.array_equal(wanted.ids, found.ids):
        place = int(np.flatnonzero(wanted.ids != found.ids)[0])
        return f"token {place} is {found.ids[place]}, not {wanted.ids[place]}"
    if not np.array_equal(wanted.trained, found.trained):
        place = int(np.flatnonzero(wanted.trained != found.trained)[0])
        return f"token {place} is {'' if found.trained[place] else 'not '}trained"
    for length in {len(wanted.ids), len(wanted.ids) * 2 // 3}:
        if wanted.stop_is_trained(length) != found.stop_is_trained(length):
            return "the stop token is trained in one only"
    return None


def unproven(slow: ChatBase, fast: FastChat | ShapedChat, *, loss_scope: str) -> str | None:
    """Why the fast path must not be used for this base and scope; None where it may."""
    taken = 0
    for row in difficult_rows(slow.control.tokens):
        found = fast.tokenise(row, loss_scope=loss_scope)
        taken += found is not None
        if why := difference(slow, row, found, loss_scope=loss_scope):
            return why
    for row in difficult_texts():
        found = fast.tokenise(row, loss_scope=loss_scope)
        if why := difference(slow, row, found, loss_scope=loss_scope):
            return why
    if not taken:
        return fast.refusal or "it takes none of the rows it was tried on"
    return None
