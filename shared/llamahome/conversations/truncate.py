"""Rows that are longer than ``max_length``: cut, dropped, or an error. Nothing silently."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.masks import Dropped
from llamahome.errors import InvalidData

TooLong = Literal["truncate", "drop", "error"]


def kept_length(trained: NDArray[np.bool_], *, max_length: int, too_long: TooLong) -> int:
    """How many of the row's first tokens are kept; a row of exactly ``max_length`` is whole.

    Cutting is between tokens and from the right, so no control token is ever cut in two. Raises
    Dropped for a row that has no trained token, or none left; InvalidData where ``too_long`` is
    "error".
    """
    tokens = len(trained)
    if not trained.any():
        raise Dropped("no_trained_token", "no token of it is trained")
    if tokens <= max_length:
        return tokens
    lengths = f"{tokens} tokens, max_length is {max_length}"
    if too_long == "error":
        raise InvalidData(
            lengths, code="row_too_long", field="too_long",
            remedy="Raise max_length, or set too_long to truncate or drop",
        )  # fmt: skip
    if too_long == "drop":
        raise Dropped("too_long", lengths)
    if not trained[:max_length].any():
        raise Dropped("too_long_no_answer", f"{lengths}, and no trained token is left")
    return max_length
