"""The elements of a JSON array, one by one, in bounded memory, whatever is wrong with them."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.conversations.arrays import ArrayReader
from llamahome.conversations.containers import layout_of
from llamahome.conversations.strict_json import Refused
from llamahome.errors import InvalidData


class Trickle(io.BytesIO):
    """Gives at most ``step`` bytes at a time, so that every seam is met."""

    step = 1

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self.step)


def elements(text: bytes, *, step: int = 1 << 20, max_bytes: int = 1000) -> list[Any]:
    stream = Trickle(text)
    stream.step = step
    found: list[Any] = []
    try:
        for line, raw, _ in ArrayReader(stream, filename="a.json", max_bytes=max_bytes):
            found.append((line, raw.reason if isinstance(raw, Refused) else raw))
    except InvalidData as error:
        found.append((error.place.line, f"refused: {error.message}"))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[],:\n é', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet='a"\\]', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 2]), st.integers(1, 9), st.booleans())
def test_every_element_comes_back_however_the_stream_is_cut(
    values: list[Any], indent: int | None, step: int, ascii_only: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    found = elements(text, step=step)
    assert [json.loads(raw) for _, raw in found] == values
    for line, raw in found:
        assert raw.splitlines()[0] in text.split(b"\n")[line - 1]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='[]{},"\\ \n1a', max_size=40), st.integers(1, 5))
def test_any_text_ends_and_the_cut_does_not_matter(text: str, step: int) -> None:
    raw = b"[" + text.encode()
    assert elements(raw, step=step) == elements(raw)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"[]", []),
        (b"\xef\xbb\xbf\n [ ]\r\n", []),
        (b'[\n{"a": 1},\n\n{"b":\n2}\n]\n', [(2, b'{"a": 1}'), (4, b'{"b":\n2}')]),
        (b'[{"a": "]}\\"[,"}, 5]', [(1, b'{"a": "]}\\"[,"}'), (1, b"5")]),
        (b"[{bad}, {}]", [(1, b"{bad}"), (1, b"{}")]),
        (b"[{} {}]", [(1, b"{} {}")]),
        (b"[1,,2]", [(1, b"1"), (1, "',' where an element must stand"), (1, b"2")]),
        (b"[,1]", [(1, "',' where an element must stand"), (1, b"1")]),
        (b"[1,\n]", [(1, b"1"), (2, "a comma after the last element")]),
        (b"[1}, 2]", [(1, b"1"), (1, "'}' where an element must stand"),
                      (1, "',' where an element must stand"), (1, b"2")]),
        (b"[1\n", [(1, b"1"), (2, "refused: the array never ends")]),
        (b"[1,", [(1, b"1"), (1, "refused: the array never ends")]),
        (b"[", [(1, "refused: the array never ends")]),
        (b'[1, {"a": "x', [(1, b"1"), (1, b'{"a": "x'), (1, "refused: the array never ends")]),
        (b'["\\', [(1, b'"\\'), (1, "refused: the array never ends")]),
        (b"[1]\n\n{}", [(1, b"1"), (3, "refused: something follows the end of the array")]),
    ],
)  # fmt: skip
def test_what_is_wrong_between_elements_is_one_record(text: bytes, found: list[Any]) -> None:
    assert elements(text) == found
    assert elements(text, step=1) == found


def test_an_element_at_the_limit_is_read_and_a_longer_one_is_not_held() -> None:
    for length, fits in ((10, True), (11, False), (900_000, False)):
        long = b'"' + b"x" * (length - 2) + b'"'
        assert elements(b"[" + long + b" , 1]", max_bytes=10) == [
            (1, long if fits else None), (1, b"1"),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        (b"", "jsonl"),
        (b'{"a": 1}\n', "jsonl"),
        (b'\xef\xbb\xbf\n\t [\r\n {"a"', "json"),
        (b"[]", "json"),
        (b"[", "json"),
        (b'[{"a": 1}]\n\n', "json"),
        (b'[{"a": 1}, {"a"', "json"),
        (b'[{"a": 1},\n{"a": 2}]', "json"),
        (b"[]\n42\n", "jsonl"),
        (b'[{"a": 1}]\n[{"a": 2}]\n', "jsonl"),
        (b"[1, 2]", "jsonl"),
        (b"PAR1\x15", "parquet"),
    ],
)
def test_an_array_of_objects_is_known_by_how_it_starts(head: bytes, layout: str) -> None:
    assert layout_of(head) == layout
