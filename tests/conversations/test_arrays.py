"""The elements of a JSON array, one by one, in bounded memory, whatever is wrong with them."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.conversations import arrays
from llamahome.conversations.arrays import ArrayReader
from llamahome.conversations.containers import layout_of
from llamahome.conversations.strict_json import Refused
from llamahome.errors import InvalidData
from support.rows import NASTY


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
        (b'[{"a": NaN,}, {\'b\': 1}, {"c": "\\q\t"}]',
         [(1, b'{"a": NaN,}'), (1, b"{'b': 1}"), (1, b'{"c": "\\q\t"}')]),
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


@pytest.mark.parametrize(
    ("text", "line", "byte", "words"),
    [
        (b"[1,\n{} {}]", 2, 7, "'{' where no value can stand"),
        (b'[{"a": 1\n}\n{"b": 2}]', 3, 11, "'{' where no value can stand"),
        # A bracket too few and one too many, rows later.
        (b'[{"a": 1,\n{"b": 2},\n{"c": 3}}]', 2, 10, "'{' where no value can stand"),
        (b'[{"a": [{"b": 1}, "c": 2}, {"d": [3]}]}]', 1, 21, "':' outside of an object"),
        (b'[{"a": [{"b": 1}}, {"d": [3]}]]', 1, 16, "'}' closes '['"),
        (b'[{"a": [{"b": 1]}, {"d": [3]}}]', 1, 15, "']' closes '{'"),
        (b'["a": [1]}, 2]', 1, 4, "':' outside of an object"),
        # A quote too few, and another one rows later.
        (b'[{"a": "x},\n{"b": "y"},\n{"c": z"}]', 2, 14, "text directly after a string"),
        (b'[{"a: "x"},\n{"b": "y"},\n{"c": z"}]', 1, 7, "text directly after a string"),
        (b'[{"a": x"},\n{"b": "y"},\n{"c": "z}]', 1, 8, "a string directly after another"),
        (b'[{"a": "x\\"},\n{"b": ""},\n{"c": "z"}]', 2, 16, "text directly after a string"),
        # Whatever stands before the end that never comes.
        (b'[{"a": "x},\n{"b": "y"}]', 2, 14, "text directly after a string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_bytes", [1000, 0])
@pytest.mark.parametrize("step", [1 << 20, 1])
def test_an_element_whose_end_cannot_be_trusted_refuses_the_file_and_says_where(
    monkeypatch: pytest.MonkeyPatch,
    text: bytes, line: int, byte: int, words: str, max_bytes: int, step: int,
) -> None:  # fmt: skip
    # Elements that are not held, too.
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 1 if max_bytes == 0 else 1 << 20)
    at, reason = elements(text, step=step, max_bytes=max_bytes)[-1]
    assert at == line
    assert reason.startswith(f"refused: {words}")
    assert f", at byte {byte} in an element" in reason


STRUCTURE = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\"]


def damaged_array(any: random.Random) -> tuple[bytes, list[bytes]]:
    """An array of rows with up to three marks too few or too many; the rows without any."""
    rows = [
        json.dumps({"messages": [
            {"role": "user", "content": "".join(any.choices(NASTY, k=any.randrange(4)))},
            {"role": "assistant", "content": any.choice(["", f"{number}", ",", "]}"])},
        ], "tools": any.choice([[], None, "[]"])}, indent=any.choice([None, 1])).encode()
        for number in range(6)
    ]  # fmt: skip
    between = any.choice([b",", b", ", b",\n"])
    spans, text = [], b"["
    for row in rows:
        text += between if spans else b""
        spans.append((len(text), len(text) + len(row)))
        text += row
    text += b"]"
    whole = dict(zip(spans, rows, strict=True))
    for at in sorted(any.sample(range(1, len(text) - 1), any.randint(1, 3)), reverse=True):
        marks = [
            place for place in range(at, len(text) - 1) if text[place : place + 1] in STRUCTURE
        ]
        place = marks[0] if marks and any.random() < 0.7 else at
        cut = place + 1 if place != at or any.random() < 0.3 else place
        text = text[:place] + (b"" if cut > place else any.choice(STRUCTURE)) + text[cut:]
        whole = {span: row for span, row in whole.items() if not span[0] <= place <= span[1]}
    return text, [*whole.values()]


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from([1 << 20, 7]))
def test_no_row_is_swallowed_by_what_is_wrong_in_another(seed: int, step: int) -> None:
    text, whole = damaged_array(random.Random(seed))
    found = [raw for _, raw in elements(text, step=step, max_bytes=10_000)]
    if not (found and isinstance(found[-1], str) and found[-1].startswith("refused")):
        assert [raw for raw in found if raw in whole] == whole


def test_an_element_nested_without_end_is_refused_in_bounded_memory() -> None:
    [found] = elements(b"[{}," + b"[" * 2_000_000)[1:]
    assert found[1].startswith("refused: nested deeper than")
