"""A byte-level BPE vocabulary on tiktoken's core, which is several times as fast.

Both merge the pair of the lowest rank first, leftmost where ranks are equal; ``tokenizers`` looks
pairs up by their two halves, tiktoken by the bytes of both together. They agree where every token
is what its own bytes are merged into, and where several merges into one token have neighbouring
ranks: a part of a text that ends up as one token was merged as if it stood alone, so the state in
which only tiktoken would merge is never reached. Both are checked here. Tokens that no merge
reaches are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llamahome.schemas import JsonObject

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BATCH = 8192
# Parts stretches that are encoded in one call, as an added token does.
SEAM = "\0"
_SEAMS = frozenset({SEAM})
# What the engine cannot hand to its automaton: look-around, atomic groups, references.
_BACKTRACKS = re.compile(r"\(\?[=!<>]|[*+?}]\+|\\[1-9GKk]")
# What :func:`_alternatives` does not read: flags to the end of the pattern, "]" as a class's first.
_UNREAD = re.compile(r"\(\?[a-zA-Z-]+\)|\[\^?\]|\\Q")


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

    ``ids`` int32 [ranks] are the tokenizer's ids, ``lengths`` int64 [ranks] the bytes of each
    token, ``spelled`` the bytes themselves. The last rank, ``seam``, is no token: it stands for
    ``SEAM`` in :meth:`encode_stretches`. ``composed`` says that text must be in Unicode's normal
    form C.
    """

    def __init__(self, document: JsonObject, tokenizer: Tokenizer) -> None:
        """``document`` is the JSON of ``tokenizer``. Raises NotByteLevel."""
        self.composed = _needs_composed(document.get("normalizer"))
        pattern = _pattern(document.get("pre_tokenizer"))
        model = document["model"]
        _check_model(model)
        added = {token["content"] for token in document["added_tokens"]}
        names = _names(model, tokenizer, added)
        ranks = {_spelled(name): rank for rank, name in enumerate(names)}
        self.seam = len(ranks)
        try:
            self._encoding = tiktoken.Encoding(
                "base", pat_str=grouped(pattern), mergeable_ranks=ranks,
                special_tokens={SEAM: self.seam},
            )  # fmt: skip
        except Exception as error:  # the library raises what its regex crate says
            raise NotByteLevel(f"its pattern cannot be used: {error}") from None
        self.spelled = [*ranks, SEAM.encode()]
        self.lengths: NDArray[np.int64] = np.array([*map(len, self.spelled)], dtype=np.int64)
        ids = [*map(model["vocab"].__getitem__, names), -1]
        self.ids: NDArray[np.int32] = np.array(ids, dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Ranks of a stretch without added tokens."""
        return self._encoding.encode_ordinary(text)

    def encode_stretches(self, text: str) -> NDArray[np.uint32]:
        """Ranks of stretches parted by ``SEAM``, each as if it stood alone, with the seams."""
        return self._encoding.encode_to_numpy(text, allowed_special=_SEAMS, disallowed_special=())  # type: ignore[no-any-return, arg-type, unused-ignore]


def grouped(pattern: str) -> str:
    """The same pattern, which matches the same, with the alternatives before the first one that
    looks around in one group: they then run as one automaton rather than one by one.
    """
    if _UNREAD.search(pattern):
        return pattern
    all = list(_alternatives(pattern))
    plain = list(itertools.takewhile(lambda one: not _BACKTRACKS.search(one), all))
    if len(plain) < 2 or len(plain) == len(all):
        return pattern
    return "|".join([f"(?:{'|'.join(plain)})", *all[len(plain) :]])


def _alternatives(pattern: str) -> Iterator[str]:
    """The pattern cut at the bars that stand in no group and no class."""
    start = groups = classes = 0
    for match in re.finditer(r"\\.|[][()|]", pattern, re.DOTALL):
        char = match[0]
        if char == "[" or (char == "]" and classes):
            classes += 1 if char == "[" else -1
        elif not classes and char in "()":
            groups += 1 if char == "(" else -1
        elif char == "|" and not classes and not groups:
            yield pattern[start : match.start()]
            start = match.end()
    yield pattern[start:]


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


def _names(model: Mapping[str, Any], tokenizer: Tokenizer, added: set[str]) -> list[str]:
    """The tokens as the vocabulary has them, by rank: the 256 bytes, then the merges."""
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
    return [*sorted(ALPHABET, key=ALPHABET.__getitem__), *(t for t in merged if t not in lost)]


def _spelled(name: str) -> bytes:
    """The bytes of a token. Raises NotByteLevel."""
    try:
        return bytes(map(ALPHABET.__getitem__, name))
    except KeyError as error:
        raise NotByteLevel(f"its merges hold {error}, which stands for no byte") from None


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
