"""Raw text as one sequence, without a chat template: what the tokenizer sets before a text on its
own, the text, and the end of the sequence.

All of the text and its end are trained, whatever the loss scope: there are no turns to choose from.
What stands before it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llamahome.conversations.base_files import TOKENIZER_JSON, refusals
from llamahome.conversations.masks import Encoded
from llamahome.schemas import JsonObject

# One word, so that what a post-processor sets around it is seen, whatever the vocabulary.
_PROBE: JsonObject = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}  # fmt: skip


class Around(NamedTuple):
    """Ids before and after a text on its own."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def around_text(
    tokenizer: Tokenizer, post_processor: JsonObject | None, named: Mapping[str, str]
) -> Around:
    """What transformers' tokenizer sets around a text, and the end of the sequence after it.

    The post-processor alone decides: transformers 5 passes over ``add_bos_token`` and
    ``add_eos_token`` where there is a tokenizer.json. Where the tokenizer has an end-of-sequence
    token, the text ends with it in any case, or the model would never learn to stop. Raises
    InvalidConfig where the post-processor cannot be read.
    """
    before, after = _probed(post_processor) if post_processor else ([], [])
    end = tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None
    if end is not None and end not in after:
        after = [*after, end]
    return Around(tuple(before), tuple(after))


def _probed(post_processor: JsonObject) -> tuple[list[int], list[int]]:
    with refusals("its post-processor cannot be read", TOKENIZER_JSON):
        probe = Tokenizer.from_str(json.dumps({**_PROBE, "post_processor": post_processor}))
        found = probe.encode("a")
        at = found.special_tokens_mask.index(0)
    return found.ids[:at], found.ids[at + 1 :]


def surrounded(
    inner: Encoded, around: Around, names: Mapping[int, str]
) -> tuple[Encoded, NDArray[np.bool_]]:
    """The text with what stands around it, and which tokens are trained, bool [n].

    ``names`` are the texts of the ids around. Nothing is trained of a text without a token.
    """
    first, last = ([names[id] for id in ids] for ids in around)
    head, tail = "".join(first), "".join(last)
    starts, ends = _places(first, 0)
    starts_after, ends_after = _places(last, len(head) + len(inner.text))
    trained = np.full(len(first) + len(inner.ids) + len(last), len(inner.ids) > 0)
    trained[: len(first)] = False
    encoded = Encoded(
        text=head + inner.text + tail,
        ids=np.concatenate([_ids(around.before), inner.ids, _ids(around.after)]),
        starts=np.concatenate([starts, inner.starts + len(head), starts_after]),
        ends=np.concatenate([ends, inner.ends + len(head), ends_after]),
        control=np.concatenate(
            [np.ones(len(first), np.bool_), inner.control, np.ones(len(last), np.bool_)]
        ),
    )
    return encoded, trained


def _places(names: Sequence[str], at: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = at + np.cumsum([0, *map(len, names)], dtype=np.int64)
    return edges[:-1], edges[1:]


def _ids(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
