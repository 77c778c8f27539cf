"""The split depends on content and seed alone, and its counts are exact."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from llamahome.conversations import split_rows, validation_groups
from llamahome.conversations.masks import Dropped
from llamahome.conversations.truncate import TooLong, kept_length
from llamahome.errors import InvalidData


def digests(count: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % index).digest() for index in range(count)]


@pytest.mark.parametrize(
    ("rows", "share", "wanted"),
    [
        (100, 0.1, 10), (100, 0.29, 29), (1, 0.5, 0), (2, 0.1, 1), (9, 0.1, 1), (10, 0.1, 1),
        (19, 0.1, 1), (20, 0.1, 2), (100, 0, 0), (0, 0.5, 0), (2, 0.999999999999, 1),
        (1000, 0.57, 570), (3, 0.9, 2),
    ],
)  # fmt: skip
def test_counts_are_exact(rows: int, share: float, wanted: int) -> None:
    """BEHAVIOUR 59: the counts of the split."""
    assert validation_groups(rows, share) == wanted
    split = split_rows(digests(rows), seed=42, share=share, keep_duplicates=True)
    assert len(split.validation) == wanted
    assert sorted([*split.training, *split.validation]) == list(range(rows))


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = digests(200)
    first = split_rows(rows, seed=42, share=0.1, keep_duplicates=True)
    shuffled = random.Random(1).sample(rows, len(rows))
    second = split_rows(shuffled, seed=42, share=0.1, keep_duplicates=True)
    assert [rows[i] for i in first.validation] == [shuffled[i] for i in second.validation]
    assert [rows[i] for i in first.training] == [shuffled[i] for i in second.training]
    other = split_rows(rows, seed=43, share=0.1, keep_duplicates=True)
    assert set(other.validation) != set(first.validation)
    assert set(first.validation) != set(range(180, 200))


def test_equal_rows_stay_on_one_side_and_are_counted_once() -> None:
    """BEHAVIOUR 41: equal rows and the split."""
    rows = digests(10) * 3
    split = split_rows(rows, seed=42, share=0.2, keep_duplicates=True)
    assert len(split.validation) == 6
    assert not {rows[i] for i in split.validation} & {rows[i] for i in split.training}
    dropped = split_rows(rows, seed=42, share=0.2, keep_duplicates=False)
    assert dropped.duplicates.tolist() == list(range(10, 30))
    assert len(dropped.validation) == 2
    assert {rows[i] for i in dropped.validation} == {rows[i] for i in split.validation}


def mask(text: str) -> np.typing.NDArray[np.bool_]:
    return np.array([char == "1" for char in text])


def test_a_row_of_exactly_max_length_is_whole() -> None:
    policies: tuple[TooLong, ...] = ("truncate", "drop", "error")
    for policy in policies:
        assert kept_length(mask("00011"), max_length=5, too_long=policy) == 5


def test_a_longer_row_is_cut_dropped_or_an_error() -> None:
    assert kept_length(mask("001110"), max_length=5, too_long="truncate") == 5
    with pytest.raises(Dropped, match="6 tokens, max_length is 5") as caught:
        kept_length(mask("001110"), max_length=5, too_long="drop")
    assert caught.value.code == "too_long"
    with pytest.raises(InvalidData, match="6 tokens, max_length is 5"):
        kept_length(mask("001110"), max_length=5, too_long="error")


def test_no_row_is_left_without_a_trained_token() -> None:
    with pytest.raises(Dropped) as caught:
        kept_length(mask("000001"), max_length=5, too_long="truncate")
    assert caught.value.code == "too_long_no_answer"
    with pytest.raises(Dropped) as caught:
        kept_length(mask("000"), max_length=5, too_long="truncate")
    assert caught.value.code == "no_trained_token"
