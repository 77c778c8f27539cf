"""Token rows as torch Datasets: items of one length, which the default collate stacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from llamahome.config import parse_training_config
from llamahome.conversations import Limits, Refused
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.formats import MESSAGES, recognise
from llamahome.conversations.masks import Dropped
from llamahome.conversations.rows import conversation_of
from llamahome.conversations.tokens import TokenRows, read_token_rows
from llamahome.conversations.truncate import kept_length
from llamahome.errors import InvalidData, InvalidState
from llamahome.local.tokenizers import chat_base_of

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index
Item = dict[str, torch.Tensor]


def padded_item(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], *, length: int, pad_id: int
) -> Item:
    """``input_ids``, ``attention_mask`` and ``labels``, int64 [length] each, of their own memory.

    ``labels`` are not shifted (a model's ``forward`` does that); -100 where nothing is learned.
    """
    tokens = min(len(ids), length)
    item = {
        "input_ids": torch.full((length,), pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(length, dtype=torch.int64),
        "labels": torch.full((length,), IGNORED, dtype=torch.int64),
    }
    row = torch.from_numpy(ids[:tokens].astype(np.int64))
    item["input_ids"][:tokens] = row
    item["attention_mask"][:tokens] = 1
    mask = torch.from_numpy(np.array(trained[:tokens]))
    item["labels"][:tokens][mask] = row[mask]
    return item


class ConversationDataset(Dataset[Item]):
    """Dataset for conversation samples, tokenised as the preprocessing stage tokenises them.

    Items are padded on the right to ``max_length``. Conversations that are longer are cut there;
    those that nothing is left of to learn from are no items, and are counted in ``dropped`` by
    reason. ``loss_scope`` says which tokens carry loss; set it in a subclass. ``lengths`` are the
    items' tokens, unpadded.
    """

    loss_scope: ClassVar[str] = "assistant"

    def __init__(
        self, conversations: list[dict[str, Any]], tokenizer: Any, max_length: int = 512
    ) -> None:
        """``tokenizer`` is a transformers tokenizer, fast or one that can be made so; it stays as
        it is.

        Raises InvalidConfig (``max_length``, the tokenizer), InvalidData naming the conversation.
        """
        scope = {"max_length": max_length, "loss_scope": self.loss_scope}
        parse_training_config(scope, source=type(self).__name__)
        self.tokenizer = tokenizer
        self.max_length = max_length
        base = chat_base_of(tokenizer)
        self.pad_token_id = base.pad_id
        self.dropped: Counter[str] = Counter()
        self._rows: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
        for index, conversation in enumerate(conversations):
            self._add(base.chat, conversation, index)

    def _add(self, chat: ChatBase, conversation: Mapping[str, Any], index: int) -> None:
        try:
            row = conversation_of(conversation, Limits(), recognise(conversation) or MESSAGES)
        except Refused as refused:
            raise InvalidData(
                f"conversation {index}: {refused.reason}", code=refused.code, field="conversations"
            ) from None
        try:
            found = chat.tokenise(row, loss_scope=self.loss_scope)
            kept = kept_length(found.trained, max_length=self.max_length, too_long="truncate")
        except Dropped as dropped:
            self.dropped[dropped.code] += 1
            return
        self._rows.append((found.ids[:kept], found.trained[:kept]))

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        """Raises IndexError outside ``[-len, len)``."""
        ids, trained = self._rows[index]
        return padded_item(ids, trained, length=self.max_length, pad_id=self.pad_token_id)


class TokenRowsDataset(Dataset[Item]):
    """One side of a prepared set, in its order; read where it lies, so it is small to pickle."""

    def __init__(self, path: Path, *, max_length: int, pad_id: int) -> None:
        """Raises CorruptArtifact, OSError."""
        self.path, self.max_length, self._pad_id = path, max_length, pad_id
        self._inode = path.stat().st_ino
        self._rows: TokenRows | None = read_token_rows(path)
        self._length = len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file: each loader process maps it itself."""
        return {**self.__dict__, "_rows": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        """Raises IndexError, and InvalidState where the set was replaced before it was read."""
        if self._rows is None:
            if self.path.stat().st_ino != self._inode:
                raise InvalidState(
                    "was replaced by another set", file=str(self.path), code="processed_mismatch",
                    remedy="Make the loaders anew",
                )  # fmt: skip
            self._rows = read_token_rows(self.path)
        ids, trained = self._rows.row(index)
        return padded_item(ids, trained, length=self.max_length, pad_id=self._pad_id)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        return [self[index] for index in indices]
