"""Text and JSON as both databases can keep them.

PostgreSQL has no U+0000, neither in text (8.3 "Character Types") nor in jsonb (8.14), and UTF-8
has no halves of surrogate pairs; a core dump's tail or a user's row may hold either. They become
U+FFFD, Unicode's mark for what could not be kept. Numbers that JSON lacks (NaN, infinity) become
null.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
# How they look in what json.dumps writes; whole pairs do too, so this only says "look closer".
_SUSPECT = re.compile(r"\\u(?:0000|d[89a-f])")


def is_storable(text: str) -> bool:
    """Whether the text can stand in the ledger as it is; one that cannot is found nowhere in it."""
    return _UNSTORABLE.search(text) is None


def storable(text: str) -> str:
    """The text with every character that cannot be kept replaced by U+FFFD."""
    return _UNSTORABLE.sub(_REPLACEMENT, text)


def storable_json(value: Any) -> str:
    """JSON that both databases take, whatever text and numbers are in it."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # not finite; a value that refers to itself raises again below
        return json.dumps(_clean(value), allow_nan=False)
    return json.dumps(_clean(value)) if _SUSPECT.search(text) else text


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
