from __future__ import annotations

import pytest

from llamahome.cli.output import duration, number, plain_table, share, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.0, "0 s"), (-1.0, "0 s"), (0.421, "0.42 s"), (3.0, "3 s"), (12.4, "12 s"),
        (59.6, "1 m 00 s"), (185, "3 m 05 s"), (7620, "2 h 07 m"), (273600, "3 d 04 h"),
    ],
)  # fmt: skip
def test_durations_have_a_unit_a_person_reads(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (812, "812 B"), (1536, "1.5 KiB"), (3 * 1024**4, "3.0 TiB")]
)
def test_sizes_have_binary_units(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.34567, "2.346"), (5e-5, "5e-05"), (1234567, "1,234,567"), (None, "-"),
        (float("nan"), "-"), ("x", "-"), (True, "-"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_missing_ones_are_a_dash(value: object, text: str) -> None:
    assert number(value) == text


def test_a_share_without_a_total_is_not_made_up() -> None:
    assert (share(42, 100), share(42, None), share(None, 3), share(0, 0)) == ("42 %", "-", "-", "-")


def test_a_plain_table_is_aligned_and_has_no_trailing_blanks() -> None:
    assert plain_table(("A", "LONG"), [["one", "x"], ["2", "three"]]) == [
        "A    LONG",
        "one  x",
        "2    three",
    ]
