"""The fast way and the exact way say the same of every row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamahome.conversations import Conversation, Limits, Source, batches, parse_row
from llamahome.conversations.checker import Checked, RowChecker
from llamahome.conversations.strict_json import NOT_JUDGED, Refused, read_exactly, read_quickly
from llamahome.schemas import Rejected
from support.rows import written

LIMITS = Limits(max_messages=4, max_chars_per_message=300)
SOURCE = Source("f", "jsonl", None, "messages", None)


def checked(rows: list[bytes], limits: Limits = LIMITS) -> list[Checked]:
    batch = [(line, raw, 0) for line, raw in enumerate(rows, 2)]
    return RowChecker(SOURCE, limits).check(batch)


def agrees(rows: list[bytes], limits: Limits = LIMITS) -> None:
    """Each row's verdict, content and digest are those of the exact way alone."""
    for line, (raw, found) in enumerate(zip(rows, checked(rows, limits), strict=True), 2):
        exact = parse_row(raw, file="f", line=line, limits=limits, read=read_exactly)
        if isinstance(exact, Conversation):
            assert isinstance(found, tuple), (raw, found)
            assert json.loads(found[0]) == exact.to_json()
            assert found[1] == exact.digest()
            assert b"\n" not in found[0]
        else:
            assert found == exact, raw


SEED = st.integers(0, 2**40)
ROWS = SEED.map(lambda seed: [written(seed + place) for place in range(1 + seed % 9)])


@settings(max_examples=400, deadline=None)
@given(ROWS)
@example([b'{"messages":[{"role":"user","content":"\\u0022\\u0022x"},'
          b'{"role":"assistant","role":"assistant","content":"x"}]}'])  # fmt: skip
def test_both_ways_say_the_same(rows: list[bytes]) -> None:
    agrees(rows)


@pytest.mark.long
@pytest.mark.timeout(900)
@settings(max_examples=30_000, deadline=None)
@given(ROWS)
def test_both_ways_say_the_same_of_very_many_rows(rows: list[bytes]) -> None:
    agrees(rows)


def test_the_rows_made_here_take_every_way() -> None:
    rows = [written(seed) for seed in range(2000)]
    found = checked(rows)
    fast = sum(
        one[0] == raw for raw, one in zip(rows, found, strict=True) if isinstance(one, tuple)
    )
    slow = sum(isinstance(one, tuple) for one in found) - fast
    codes = {one.code for one in found if isinstance(one, Rejected)}
    assert fast > 300
    assert slow > 100
    assert codes >= {
        "duplicate_key", "not_finite", "lone_surrogate", "not_utf8", "too_deep", "invalid_json",
        "invalid_role", "message_too_long", "too_many_messages", "empty_content",
    }  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(SEED.map(written) | st.binary(max_size=30))
def test_the_quick_reader_gives_a_value_only_where_the_exact_one_does(raw: bytes) -> None:
    quick = read_quickly(raw)
    if quick is not NOT_JUDGED:
        assert repr(quick) == repr(read_exactly(raw))


def row_of(*contents: str, **more: Any) -> bytes:
    turns = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(contents)
    ]
    return json.dumps({"messages": turns, **more}).encode()


def test_one_bad_row_of_a_batch_costs_no_other_one() -> None:
    twice = b'{"messages":[],"messages":' + row_of("a", "b")[12:]
    rows = [row_of("a", "b"), twice, row_of('c \\" \\\\', '"d"'), b"", row_of("e", "f")]
    found = checked(rows)
    assert [found_one[0] for found_one in found if isinstance(found_one, tuple)] == [
        rows[0], rows[2], rows[4],
    ]  # fmt: skip
    assert isinstance(found[1], Rejected)
    assert (found[1].code, found[1].line) == ("duplicate_key", 3)
    assert found[3] is None


def test_plain_rows_are_taken_as_they_are_written_and_equal_ones_have_one_digest() -> None:
    rows = [
        row_of("a", "b"), row_of("a", "b").replace(b" ", b""), row_of("a", "b", id=5, note="x"),
        row_of("a", "b").replace(b'"a"', b'"\\u0061"'),
        b'{"messages": [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]}',
        b'{"conversation": [{"content": "a", "role": "user"}, '
        b'{"content": "b", "weight": 1, "role": "assistant"}]}',
    ]  # fmt: skip
    found = [one for one in checked(rows) if isinstance(one, tuple)]
    assert len(found) == len(rows)
    assert len({digest for _, digest in found}) == 1
    assert found[0][0] == rows[0]
    other = checked([row_of("a", "c"), row_of("ab", ""), row_of("a", "b")])
    assert isinstance(other[1], Rejected)
    assert isinstance(other[2], tuple)
    assert other[2][1] == found[0][1]
    assert isinstance(other[0], tuple)
    assert other[0][1] != found[0][1]


def test_limits_hold_on_the_fast_way() -> None:
    at = Limits(max_messages=2, max_chars_per_message=100)
    agrees([row_of("x" * 100, "y"), row_of("x" * 101, "y"), row_of("a", "b", "c", "d")], at)
    agrees([row_of("é" * 100, "y"), row_of("é" * 101, "y")], at)


def test_a_row_over_several_lines_is_written_on_one() -> None:
    pretty = json.dumps(json.loads(row_of('a "', "b\\")), indent=1).encode()
    found = checked([pretty, row_of('a "', "b\\"), pretty.replace(b'"role"', b'"role": 1, "role"')])
    assert isinstance(found[0], tuple)
    assert isinstance(found[1], tuple)
    assert b"\n" not in found[0][0]
    assert json.loads(found[0][0]) == json.loads(pretty)
    assert found[0][1] == found[1][1]
    assert isinstance(found[2], Rejected)
    assert found[2].code == "duplicate_key"


def test_integers_of_any_size_in_tools_have_a_digest() -> None:
    tool = {"function": {"name": "f", "limit": 10**30, "share": 0.5}}
    one = Conversation(({"role": "user", "content": "x"},), (tool,))
    turned = {"function": dict(reversed(tool["function"].items()))}
    assert one.digest() == Conversation(one.messages, (turned,)).digest()
    assert one.digest() != Conversation(one.messages).digest()


def test_batches_are_bounded_in_rows_and_bytes() -> None:
    small = [(line, b"x", line) for line in range(150)]
    assert [len(batch) for batch in batches(small)] == [64, 64, 22]
    large = [(line, b"x" * 700_000, line) for line in range(5)]
    assert [len(batch) for batch in batches(large)] == [2, 2, 1]
    odd = [(1, None, 0), (2, Refused("a", "b"), 0)]
    assert list(batches(odd)) == [odd]
    assert list(batches([])) == []
