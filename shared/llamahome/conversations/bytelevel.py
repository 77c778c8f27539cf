"""A byte-level BPE vocabulary on tiktoken's core, which is several times as fast.

Both merge the pair of the lowest rank first, leftmost where ranks are equal; ``tokenizers`` looks
pairs up by their two halves, tiktoken by the bytes of both together. They agree where every token
is what its own bytes are merged into, and where several merges into one token have neighbouring
ranks: a part of a text that ends up as one token was merged as if it stood alone, so the state in
which only tiktoken would merge is never reached. Both are checked here. Tokens that no merge
reaches are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llamahome.schemas import JsonObject

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BATCH = 8192


class NotByteLevel(Exception):
    """Why a tokenizer cannot run on tiktoken's core."""


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte, as in GPT-2's ``bytes_to_unicode``."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


ALPHABET = _alphabet()


class ByteLevelCore:
    """Text without added tokens to ranks: int numbers that index ``ids`` and ``lengths``.

    ``ids`` int32 [ranks] are the tokenizer's ids, ``lengths`` the bytes of each token, ``spelled``
    the bytes themselves. ``composed`` says that text must be in Unicode's normal form C.
    """

    def __init__(self, document: JsonObject, tokenizer: Tokenizer) -> None:
        """``document`` is the JSON of ``tokenizer``. Raises NotByteLevel."""
        self.composed = _needs_composed(document.get("normalizer"))
        pattern = _pattern(document.get("pre_tokenizer"))
        model = document["model"]
        _check_model(model)
        ranks = _ranks(model, tokenizer, {token["content"] for token in document["added_tokens"]})
        try:
            self._encoding = tiktoken.Encoding(
                "base", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
        except Exception as error:  # the library raises what its regex crate says
            raise NotByteLevel(f"its pattern cannot be used: {error}") from None
        vocab = model["vocab"]
        chars = {byte: char for char, byte in ALPHABET.items()}
        self.spelled = list(ranks)
        self.lengths = [len(token) for token in ranks]
        self.ids: NDArray[np.int32] = np.array(
            [vocab["".join(map(chars.__getitem__, token))] for token in ranks], dtype=np.int32
        )

    def encode(self, text: str) -> list[int]:
        """Ranks of a stretch without added tokens."""
        # A list: tiktoken's way to an array looks for special tokens first, and is slower.
        return self._encoding.encode_ordinary(text)


def _needs_composed(normalizer: Any) -> bool:
    if normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}:
        return False
    if normalizer == {"type": "NFC"}:
        return True
    raise NotByteLevel(f"its normalizer is {_type_of(normalizer)}")


def _pattern(pre_tokenizer: Any) -> str:
    steps = [pre_tokenizer]
    if _type_of(pre_tokenizer) == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    last = steps[-1]
    if _type_of(last) != "ByteLevel":
        raise NotByteLevel(f"its pre-tokenizer is {_type_of(last)}, not ByteLevel")
    if last.get("add_prefix_space"):
        raise NotByteLevel("its pre-tokenizer adds a space in front")
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2
    if len(steps) != 2 or last.get("use_regex", True) or _type_of(steps[0]) != "Split":
        raise NotByteLevel("its pre-tokenizer has steps other than one split")
    split = steps[0]
    pattern = split["pattern"].get("Regex")
    if pattern is None or (split["behavior"], split["invert"]) not in (
        ("Isolated", False), ("Removed", True),
    ):  # fmt: skip
        raise NotByteLevel("its pre-tokenizer splits in another way than tiktoken")
    return str(pattern)


def _type_of(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "missing"


def _check_model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise NotByteLevel(f"its model is {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise NotByteLevel(f"its model has {name}")


def _ranks(
    model: Mapping[str, Any], tokenizer: Tokenizer, added: set[str]
) -> dict[bytes, int]:  # fmt: skip
    """Rank by bytes, in the order of ranks: the 256 bytes, then the merges."""
    vocab: dict[str, int] = model["vocab"]
    missing = [char for char in ALPHABET if char not in vocab]
    if missing:
        raise NotByteLevel(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    merged: dict[str, None] = {}
    last = ""
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if token != last and token in merged:
            raise NotByteLevel(f"its merges into {token!r} are not neighbours")
        merged[token] = None
        last = token
    lost = _unreached(list(merged), vocab, tokenizer)
    if model.get("ignore_merges"):
        lost |= vocab.keys() - merged.keys() - ALPHABET.keys() - added
        if lost:
            raise NotByteLevel(f"{len(lost)} of its tokens, {min(lost)!r} one, come from no merge")
    try:
        spelled = [bytes(ALPHABET[char] for char in token) for token in merged if token not in lost]
    except KeyError as error:
        raise NotByteLevel(f"its merges hold {error}, which stands for no byte") from None
    singles = [bytes([byte]) for byte in range(256)]
    return {token: rank for rank, token in enumerate(singles + spelled)}


def _unreached(tokens: list[str], vocab: Mapping[str, int], tokenizer: Tokenizer) -> set[str]:
    """Those that are not what their own characters are merged into."""
    model = tokenizer.model
    whole = model.ignore_merges
    model.ignore_merges = False
    try:
        bare = Tokenizer(model)
        found = set()
        for start in range(0, len(tokens), _BATCH):
            batch = tokens[start : start + _BATCH]
            for token, encoding in zip(batch, bare.encode_batch_fast(batch), strict=True):
                if encoding.ids != [vocab[token]]:
                    found.add(token)
        return found
    finally:
        model.ignore_merges = whole
