"""No input crashes the way from bytes to conversations, and every record of it has an outcome."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.conversations import Limits, Record, batches, dump, examine, records, shown_raw
from llamahome.conversations.checker import Checked, RowChecker
from llamahome.conversations.formats import FORMATS
from llamahome.errors import InvalidConfig, InvalidData
from llamahome.schemas import Rejected
from support.rows import damaged, written

LIMITS = Limits(max_messages=5, max_chars_per_message=400, max_line_bytes=2000)
# So many inputs are made of each example's bytes and number.
INPUTS = 20
FOREIGN = (
    {"instruction": 'Say "x"', "input": "", "output": "y", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
     "tools": "[]", "system": "x"},
    {"conversations": [{"from": "human", "value": "x"},
                       {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
    {"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]},
    {"text": "x"},
)  # fmt: skip


def inputs(raw: bytes, seed: int) -> Iterator[bytes]:
    any = random.Random(seed)
    rows = [written(seed + place) for place in range(7)]
    foreign = [damaged(json.dumps(row).encode(), any) for row in FOREIGN]
    yield raw
    yield from (b"[" + raw, b"\x1f\x8b" + raw, b"\x28\xb5\x2f\xfd" + raw, b"PAR1" + raw)
    yield b"[" + rows[0] + b"," + raw + b"," + rows[1] + b"]"
    yield rows[0] + b"\n" + raw + b"\r\n" + rows[1]
    yield from rows[2:5]
    yield from foreign
    yield damaged(b"[" + b", ".join(foreign) + b"]", any)
    yield b"\n".join(foreign)
    yield gzip.compress(rows[5] + b"\n" + raw, 1)
    yield damaged(gzip.compress(rows[6], 1), any)
    yield damaged(b"\xef\xbb\xbf" + rows[6], any)


def outcome(content: bytes, format: str | None) -> None:
    stream = io.BytesIO(content)
    refused = "missing_extra"
    try:
        source = examine(stream, filename="f", limits=LIMITS, format=format)
        checker = RowChecker(source, LIMITS)
        for batch in batches(records(stream, source, LIMITS)):
            found = checker.check(batch, first=True)
            assert len(found) == len(batch)
            for record, one in zip(batch, found, strict=True):
                assert_told(record, one)
    except (InvalidData, InvalidConfig) as error:
        refused = error.code
    # The extra is that of Zstandard and Parquet, where their libraries are not installed.
    assert refused in ("missing_extra", "broken_archive", "archive_too_large", "broken_array")


def assert_told(record: Record, one: Checked) -> None:
    line, raw, _ = record
    if isinstance(one, Rejected):
        shown = shown_raw(raw if isinstance(raw, bytes) else None)
        assert dump({**one.model_dump(mode="json"), "raw": shown})
        assert one.line == line >= 1
    elif one is not None:
        body = json.loads(one[0])
        assert body.get("messages") or body["text"]
        assert b"\n" not in one[0]
        assert len(one[1]) == 32


def all_outcomes(raw: bytes, seed: int) -> None:
    made = list(inputs(raw, seed))
    assert len(made) == INPUTS
    for content in made:
        outcome(content, [None, *FORMATS][seed % 6] if seed % 3 == 0 else None)


@settings(max_examples=10_000 // INPUTS, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 2**40))
def test_ten_thousand_inputs_have_an_outcome(raw: bytes, seed: int) -> None:
    all_outcomes(raw, seed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=100_000 // INPUTS, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**40))
def test_a_hundred_thousand_inputs_have_an_outcome(raw: bytes, seed: int) -> None:
    all_outcomes(raw, seed)
