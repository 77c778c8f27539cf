"""A transformers tokenizer as the data stages' own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamahome.conversations.chat import ChatBase
from llamahome.conversations.tokenizer import ChatTokenizer
from llamahome.errors import InvalidConfig

_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class TokenizerBase(NamedTuple):
    """``pad_id`` is the pad token's; without one the end's, without that 0: no loss is on it."""

    chat: ChatBase
    pad_id: int


def chat_base_of(tokenizer: Any) -> TokenizerBase:
    """Vocabulary, special tokens and chat template of ``tokenizer``, which is not changed.

    A pad token that is a piece of words like any other, as ``tokenizer.pad_token = "!"`` makes it,
    is padded with and stays ordinary in text, as in transformers.
    Raises InvalidConfig where it cannot be read, or another special token is such a piece.
    """
    names = {name: getattr(tokenizer, name, None) for name in _NAMED}
    config: dict[str, Any] = {name: str(text) for name, text in names.items() if text is not None}
    backend = _backend(tokenizer)
    document: dict[str, Any] = json.loads(backend.to_str())
    pieces = _pieces(document)
    added = {token["content"] for token in document["added_tokens"]}
    ordinary = None
    if config.get("pad_token") in pieces - added:
        ordinary = backend.token_to_id(config.pop("pad_token"))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        config["chat_template"] = template
    found = ChatTokenizer(document, config)
    for token in found.added:
        if token.special and token.text in pieces:
            raise InvalidConfig(
                f"the special token {token.text!r} is a piece of words, too", code="invalid_base",
                field="tokenizer",
                remedy="Take one that stands for nothing else, such as '<pad>', from "
                "tokenizer.add_special_tokens",
            )  # fmt: skip
    return TokenizerBase(ChatBase(found), pad_id(found) if ordinary is None else ordinary)


def _pieces(document: Mapping[str, Any]) -> set[str]:
    """What a byte-pair encoder makes words of; empty for other kinds."""
    merges = document["model"].get("merges") or []
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return {piece for pair in pairs for piece in pair}


def pad_id(tokenizer: ChatTokenizer) -> int:
    """See :class:`TokenizerBase`."""
    ids = {token.text: token.id for token in tokenizer.added}
    for name in ("pad_token", "eos_token"):
        if tokenizer.named.get(name) in ids:
            return ids[tokenizer.named[name]]
    return 0


def _backend(tokenizer: Any) -> Any:
    """The ``tokenizers`` object of a fast tokenizer, or one made of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend
    if hasattr(tokenizer, "to_str"):
        return tokenizer
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return convert_slow_tokenizer(tokenizer)
    except (ValueError, AttributeError, ImportError) as error:
        raise InvalidConfig(
            f"{type(tokenizer).__name__} cannot be made a fast tokenizer: {error}",
            code="invalid_base", field="tokenizer",
            remedy="Use AutoTokenizer.from_pretrained(...) on a model with a tokenizer.json",
        ) from error  # fmt: skip
