"""Control tokens against text that only looks like them.

Only what the chat template itself writes may become a control token. A row whose texts hold the
spelling of one is rendered a second time with private marks around each such spelling; the marks
tell, in the rendered text, the template's own from the row's. Most rows hold none and are rendered
and encoded as they are.

The control tokens are the tokenizer's special tokens and, in what is not the assistant's, the other
added tokens that the template writes (turn markers). An assistant may write those: a reasoning or
tool-call tag in an answer is part of what is learned.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from llamahome.conversations.conversation import ASSISTANT, Conversation

_PRIVATE = range(0xF0000, 0xFFFFE)


@dataclasses.dataclass(frozen=True, slots=True)
class Marks:
    """Characters that stand nowhere in the row: before and after a spelling, and at a seam."""

    before: str
    after: str
    seam: str

    @classmethod
    def absent_from(cls, texts: Collection[str]) -> Marks:
        taken = {char for text in texts for char in text if ord(char) >= _PRIVATE.start}
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        return cls(next(free), next(free), next(free))

    def strip(self, text: str) -> str:
        for mark in (self.before, self.after, self.seam):
            text = text.replace(mark, "")
        return text


class ControlText:
    """Finds and marks the spellings of control tokens in a conversation's texts."""

    def __init__(self, special: Collection[str], template: Collection[str]) -> None:
        """``special``: neutral in every text; ``template``: in all but the assistant's."""
        self.tokens = frozenset(special) | frozenset(template)
        self._for_assistant = _Spellings(special)
        self._for_others = _Spellings(self.tokens)
        self._edges = {token[place] for token in self.tokens if token for place in (0, -1)}

    def is_far_from(self, text: str) -> bool:
        """Whether no spelling can begin or end anywhere in ``text``, nor in a part of it.

        Cheaper than :meth:`touches`, and often enough to know.
        """
        return not any(char in text for char in self._edges)

    def occurs_in(self, conversation: Conversation) -> bool:
        """Whether some text holds a spelling, or an end or start that a neighbour may complete."""
        return any(self.touches(role, text) for role, text in conversation.texts())

    def touches(self, role: str, text: str) -> bool:
        """Whether one text of a message of ``role`` does."""
        return self._of(role).touches(text)

    def marked(self, conversation: Conversation, marks: Marks) -> Conversation:
        """A copy with marks around every spelling, and beside every end that could become one."""
        messages = tuple(
            {
                key: value if key in ("role", "weight")
                else self._of(message["role"]).mark(value, marks)
                for key, value in message.items()
            }
            for message in conversation.messages
        )  # fmt: skip
        tools = self._for_others.mark(list(conversation.tools), marks)
        return Conversation(messages, tuple(tools))

    def _of(self, role: str) -> _Spellings:
        return self._for_assistant if role == ASSISTANT else self._for_others


class _Spellings:
    """The spellings of one set of tokens."""

    def __init__(self, tokens: Collection[str]) -> None:
        self.pattern = any_of(tokens)
        self._starts = frozenset(token[:n] for token in tokens for n in range(1, len(token)))
        self._ends = frozenset(token[-n:] for token in tokens for n in range(1, len(token)))
        self._longest = max((len(token) for token in tokens), default=0)
        self._first = {token[:1] for token in tokens}
        self._last = {token[-1:] for token in tokens}

    def touches(self, text: str) -> bool:
        # Most texts lack the characters that tokens start and end with, which is cheap to see.
        for first in self._first:
            if first in text and (self.pattern.search(text) or self._opens(text)):
                return True
        for head in (text[: self._longest], text.lstrip()[: self._longest]):
            for last in self._last:
                if last in head:
                    return self._closes(text)
        return False

    def mark(self, value: Any, marks: Marks) -> Any:
        if isinstance(value, str):
            return self._mark_text(value, marks)
        if isinstance(value, dict):
            return {self.mark(key, marks): self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, marks) for item in value]
        return value

    def _mark_text(self, text: str, marks: Marks) -> str:
        core = text.strip()
        if not core:
            return text
        # Marks stay inside the stripped text: templates may strip, and must still be able to.
        left, right = text[: text.index(core[0])], text[len(text.rstrip()) :]
        found = self.pattern.sub(lambda m: f"{marks.before}{m[0]}{marks.after}", core)
        before = marks.seam if self._closes(text) else ""
        after = marks.seam if self._opens(text) else ""
        return f"{left}{before}{found}{after}{right}"

    def _opens(self, text: str) -> bool:
        """Whether the text ends as a token starts."""
        return any(
            end[-n:] in self._starts
            for end in {text, text.rstrip()}
            for n in range(1, min(self._longest, len(end) + 1))
        )

    def _closes(self, text: str) -> bool:
        """Whether the text starts as a token ends."""
        return any(
            start[:n] in self._ends
            for start in {text, text.lstrip()}
            for n in range(1, min(self._longest, len(start) + 1))
        )


def any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches any of ``tokens``, the longest first; never where there are none."""
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
