from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamahome.conversations.tokens import TokenRow, TokenRows, read_token_rows, write_token_rows
from llamahome.errors import InvalidData
from llamahome.training.data import TokenData, labelled_counts


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., TokenRows]:
    def make(name: str, *rows: tuple[list[int], list[int]]) -> TokenRows:
        path = tmp_path / f"{name}.safetensors"
        write_token_rows(
            path, [TokenRow(np.array(i, np.int32), np.array(t, np.bool_)) for i, t in rows]
        )
        return read_token_rows(path)

    return make


def test_a_rows_first_token_is_predicted_by_nothing_and_is_not_counted(
    write: Callable[..., TokenRows],
) -> None:
    rows = write("a", ([1, 2], [1, 1]), ([3], [1]), ([4, 5, 6], [0, 0, 0]))

    assert labelled_counts(rows).tolist() == [1, 0, 0]


def test_the_digest_tells_apart_ids_masks_and_sides(write: Callable[..., TokenRows]) -> None:
    one = write("a", ([1, 2, 3], [0, 1, 1]))
    other_mask = write("b", ([1, 2, 3], [0, 0, 1]))
    other_ids = write("c", ([1, 2, 4], [0, 1, 1]))
    empty = write("d")

    digests = {
        TokenData(one, empty).digest(),
        TokenData(other_mask, empty).digest(),
        TokenData(other_ids, empty).digest(),
        TokenData(empty, one).digest(),
    }

    assert len(digests) == 4
    assert TokenData(one, empty).digest() == TokenData(one, empty).digest()


def test_no_rows_and_nothing_to_learn_are_refused(write: Callable[..., TokenRows]) -> None:
    """BEHAVIOUR 77: zero rows are refused."""
    empty, silent = write("a"), write("b", ([1, 2], [1, 0]))

    with pytest.raises(InvalidData, match="no training rows"):
        TokenData(empty, empty).check()
    with pytest.raises(InvalidData, match="none of 1 training rows"):
        TokenData(silent, empty).check()
