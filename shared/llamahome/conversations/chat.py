"""A base as the data stages need it: its tokenizer, its chat template, and rows through both."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llamahome.conversations.agreement import agree
from llamahome.conversations.control import ControlText, Marks, any_of
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.masks import Dropped, Encoded, stop_is_trained, trained_tokens
from llamahome.conversations.raw_text import surrounded
from llamahome.conversations.templates import ChatTemplate, Rendered, TemplateRefused
from llamahome.conversations.tokenizer import RENAME_MARKS, ChatTokenizer, other_name


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenised:
    """One row: ``ids`` int32 [n], ``trained`` bool [n], before any truncation.

    ``text`` is what the template wrote, ``starts`` and ``ends`` int64 [n] the characters of it
    that each token covers; ``control`` bool [n] marks control tokens; ``neutralised`` counts the
    spellings of control tokens that were kept as text; ``agreed`` says that the mask was derived
    a second time, from the places of the messages' texts, where those can be followed.
    """

    text: str
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    control: NDArray[np.bool_]
    neutralised: int = 0
    agreed: bool = False

    def stop_is_trained(self, length: int | None = None) -> bool:
        """Whether, of the first ``length`` tokens, the last trained one is a control token."""
        return stop_is_trained(self.text, self, length)


class ChatBase:
    """Rows to ids and masks, exactly as ``apply_chat_template(tokenize=True)`` gives the ids.

    Rows leave nothing behind in it, so threads may share it.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, today: datetime.datetime | None = None) -> None:
        """Raises InvalidConfig where the template cannot be read."""
        self.tokenizer = tokenizer
        sources = [tokenizer.template_for(tools=tools) for tools in (False, True)]
        self.template, self._tool_template = (
            ChatTemplate(source, tokenizer.named, today=today) for source in sources
        )
        self.has_template = bool(tokenizer.templates)
        added = [token for token in tokenizer.added if not token.text.isspace()]
        special = {token.text for token in added if token.special}
        written = {token.text for token in added if self._writes(token.text)}
        self.control = ControlText(special, written - special)
        self._control_ids = np.array(
            [token.id for token in added if token.text in self.control.tokens], dtype=np.int32
        )
        self._names = {id: tokenizer.text_of(id) for ids in tokenizer.around for id in ids}
        self._twin: Tokenizer | None = None

    @classmethod
    def load(
        cls, base_dir: Path, *, today: datetime.datetime | None = None, markers: bool = False
    ) -> ChatBase:
        """From the base's folder; with ``markers`` instead of its own template (``markers``).

        Raises NotFound and InvalidConfig.
        """
        return cls(ChatTokenizer.load(base_dir, markers=markers), today=today)

    @property
    def tokenizer_digest(self) -> str:
        return self.tokenizer.digest

    @property
    def template_digest(self) -> str:
        """sha256 over the templates for rows without and with tools."""
        both = f"{self.template.digest} {self._tool_template.digest}"
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def template_source(self) -> str:
        """The template for rows without tools: the base's own, or the fallback."""
        return self.template.source

    @property
    def uses_clock(self) -> bool:
        """Whether the template asks for today's date."""
        return self.template.uses_clock or self._tool_template.uses_clock

    def tokenise(self, conversation: Conversation, *, loss_scope: str) -> Tokenised:
        """Ids and trained mask of one row, untruncated. Raises Dropped with the reason, among them
        that the two derivations of the mask (``masks``, ``agreement``) disagree.

        Raw text is the same in every scope (``raw_text``).
        """
        if conversation.text is not None:
            return self._tokenise_text(conversation.text, conversation.weight)
        template = self._tool_template if conversation.tools else self.template
        try:
            rendered = template.render(conversation)
        except TemplateRefused as refused:
            raise Dropped("template_refused", f"the chat template says: {refused}") from None
        encoded, neutralised = self._encode(conversation, template, rendered)
        trained = trained_tokens(conversation, template, rendered, encoded, loss_scope)
        return Tokenised(
            text=rendered.text, ids=encoded.ids, trained=trained, starts=encoded.starts,
            ends=encoded.ends, control=encoded.control, neutralised=neutralised,
            agreed=agree(conversation, template, encoded, trained, loss_scope),
        )  # fmt: skip

    def _tokenise_text(self, text: str, weight: int) -> Tokenised:
        inner, neutralised = self._encode_text(text)
        encoded, trained = surrounded(inner, self.tokenizer.around, self._names)
        return Tokenised(
            text=encoded.text, ids=encoded.ids, trained=trained & (weight == 1),
            starts=encoded.starts, ends=encoded.ends, control=encoded.control,
            neutralised=neutralised, agreed=True,
        )  # fmt: skip

    def _encode_text(self, text: str) -> tuple[Encoded, int]:
        """Text without a control token, and how many it spells."""
        encoding = self.tokenizer.encode(text)
        encoded = self.encoded(text, encoding.ids, np.array(encoding.offsets))
        if not encoded.control.any():
            return encoded, 0
        if any(mark in text for mark in RENAME_MARKS):
            raise Dropped("control_text", "holds a control token and a character kept for them")
        encoding = self._twin_tokenizer().encode(text, add_special_tokens=False)
        spelled = len(any_of(self.control.tokens).findall(text))
        return self.encoded(text, encoding.ids, np.array(encoding.offsets)), spelled

    def _twin_tokenizer(self) -> Tokenizer:
        if self._twin is None:
            self._twin = self.tokenizer.renamed(self.control.tokens)
        return self._twin

    def _writes(self, token: str) -> bool:
        return self.template.writes(token) or self._tool_template.writes(token)

    def _encode(
        self, conversation: Conversation, template: ChatTemplate, rendered: Rendered
    ) -> tuple[Encoded, int]:
        if not self.control.occurs_in(conversation):
            encoding = self.tokenizer.encode(rendered.text)
            return self.encoded(rendered.text, encoding.ids, np.array(encoding.offsets)), 0
        return self._encode_marked(conversation, template, rendered.text)

    def _encode_marked(
        self, conversation: Conversation, template: ChatTemplate, text: str
    ) -> tuple[Encoded, int]:
        marks = Marks.absent_from([text, template.source])
        try:
            marked = template.render(self.control.marked(conversation, marks)).text
        except TemplateRefused as refused:
            raise Dropped("control_text", f"the chat template says: {refused}") from None
        if marks.strip(marked) != text or any(mark in text for mark in RENAME_MARKS):
            raise Dropped(
                "control_text",
                "holds the text of a control token where the chat template takes it apart",
            )
        respelled, places, neutralised = self._respell(marked, marks)
        encoding = self._twin_tokenizer().encode(respelled, add_special_tokens=False)
        offsets = places[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)]
        return self.encoded(text, encoding.ids, offsets), neutralised

    def _respell(self, marked: str, marks: Marks) -> tuple[str, NDArray[np.int64], int]:
        """The text for the twin tokenizer, and for each of its characters the place in the plain
        text; marks are gone, the template's own control tokens have their other names.
        """
        token = any_of(self.control.tokens).pattern
        pieces: list[str] = []
        places: list[NDArray[np.int64]] = []
        at = neutralised = last = 0
        pattern = re.compile(
            f"{marks.before}(?P<text>{token}){marks.after}|[{marks.before}{marks.after}{marks.seam}]"
            f"|(?P<control>{token})"
        )
        for match in pattern.finditer(marked):
            plain = marked[last : match.start()] + (match["text"] or "")
            neutralised += match["text"] is not None
            pieces.append(plain)
            places.append(np.arange(at, at + len(plain)))
            at += len(plain)
            if control := match["control"]:
                pieces.append(other_name(control))
                inner = np.arange(at, at + len(control))
                places.append(np.concatenate([[at], inner, [at + len(control) - 1]]))
                at += len(control)
            last = match.end()
        pieces.append(marked[last:])
        places.append(np.arange(at, at + len(marked) - last + 1))
        return "".join(pieces), np.concatenate(places), neutralised

    def encoded(self, text: str, ids: list[int], offsets: NDArray[np.int64]) -> Encoded:
        """Arrays of what the tokenizer gave for ``text``."""
        array = np.array(ids, dtype=np.int32)
        offsets = offsets.reshape(-1, 2)
        control = np.isin(array, self._control_ids)
        # The token for unknown text has a control token's id without being one.
        for place in np.flatnonzero(array == self.tokenizer.unknown_id):
            control[place] = text[slice(*offsets[place])].strip() == self.tokenizer.unknown
        return Encoded(
            text=text,
            ids=array,
            starts=offsets[:, 0].astype(np.int64),
            ends=offsets[:, 1].astype(np.int64),
            control=control,
        )
