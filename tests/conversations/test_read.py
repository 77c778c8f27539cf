"""Any local file, row by row, with no hint about its format."""

from __future__ import annotations

import gzip
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations import Conversation, Limits, examine, read_conversations
from llamahome.errors import InvalidConfig, InvalidData, NotFound
from llamahome.schemas import Rejected
from support.data import row

ALPACA = [{"instruction": f"Say {n}", "input": "", "output": f"It is {n}."} for n in range(3)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Say {n}"}, {"from": "gpt", "value": "No."}]}
    for n in range(3)
]


def found_in(path: Path, **options: Any) -> list[tuple[int, str]]:
    """(line, "ok" or the reason's code) of each row."""
    return [
        (line, found.code if isinstance(found, Rejected) else "ok")
        for line, found in read_conversations(path, **options)
    ]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "format", "container", "lines"),
    [
        (jsonl(ALPACA), "alpaca", "jsonl", [1, 2, 3]),
        (gzip.compress(jsonl(SHAREGPT), mtime=0), "sharegpt", "jsonl.gz", [1, 2, 3]),
        (json.dumps(ALPACA).encode(), "alpaca", "json", [1, 1, 1]),
        (json.dumps(SHAREGPT, indent=1).encode(), "sharegpt", "json", [2, 14, 26]),
        (
            gzip.compress(b" " + json.dumps(ALPACA).encode(), mtime=0),
            "alpaca",
            "json.gz",
            [1, 1, 1],
        ),
        (b"\xef\xbb\xbf" + row(1) + b"\r\n\n" + row(2), "messages", "jsonl", [1, 3]),
    ],
)
def test_files_are_read_with_no_hint(
    tmp_path: Path, content: bytes, format: str, container: str, lines: list[int]
) -> None:
    # The name says nothing: what is inside does.
    path = tmp_path / "rows.dat"
    path.write_bytes(content)
    with path.open("rb") as stream:
        source = examine(stream, filename="rows.dat", limits=Limits())
    assert (source.format, source.container) == (format, container)
    assert source.divisible is (container == "jsonl")
    assert found_in(path) == [(line, "ok") for line in lines]


def test_the_first_row_that_has_a_format_decides_and_the_rest_must_follow(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"{broken\n\n{}\n42\n" + jsonl(ALPACA[:1]) + jsonl(SHAREGPT[:1]) + row(1))
    assert found_in(path) == [
        (1, "invalid_json"), (3, "missing_column"), (4, "not_an_object"), (5, "ok"),
        (6, "mixed_format"), (7, "mixed_format"),
    ]  # fmt: skip


def test_a_named_format_is_taken_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_bytes(jsonl([{**ALPACA[0], **SHAREGPT[0]}, SHAREGPT[1]]))
    assert found_in(path) == [(1, "ok"), (2, "ok")]
    assert found_in(path, format="alpaca") == [(1, "ok"), (2, "mixed_format")]
    with pytest.raises(InvalidConfig, match="unknown format 'alpacca'") as caught:
        found_in(path, format="alpacca")
    assert "alpaca" in str(caught.value.remedy)


def test_a_rejected_element_is_named_by_its_number_for_its_line_says_little(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ALPACA, {"instruction": "x"}, 5]))
    bad = [found for _, found in read_conversations(path) if isinstance(found, Rejected)]
    assert [(found.line, found.reason) for found in bad] == [
        (1, "element 4: has no output"), (1, "element 5: the row is a number, not an object"),
    ]  # fmt: skip


def test_an_array_that_does_not_end_where_it_should_is_refused_whole(tmp_path: Path) -> None:
    """A missing quote swallows the rows after it: their number is not known."""
    path, whole = tmp_path / "rows.json", json.dumps(ALPACA)
    for text in (whole[:-30], whole.replace('"output": "', '"output": ', 1), whole + whole):
        path.write_text(text)
        with pytest.raises(InvalidData) as caught:
            found_in(path)
        assert (caught.value.code, caught.value.place.file) == ("broken_array", "rows.json")


def test_a_format_is_told_after_any_number_of_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" * 200 + "\n".join(json.dumps(row) for row in ALPACA))
    assert {code for _, code in found_in(path)} == {"ok"}


def test_empty_columns_of_a_table_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": None, "conversations": turns}) + "\n")
    assert found_in(path) == [(1, "ok")]


def test_reasoning_has_the_limit_of_any_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    answer = {"role": "assistant", "content": "a", "reasoning_content": "x" * 2_000_000}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, answer]}) + "\n")
    assert found_in(path) == [(1, "message_too_long")]


def test_rows_of_lists_are_lines_and_no_array(tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_bytes(b'[{"role": "user"}]\n[{"role": "user"}]\n')
    assert found_in(path) == [(1, "not_an_object"), (2, "not_an_object")]


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file .*nothing.jsonl"):
        found_in(tmp_path / "nothing.jsonl")
    with pytest.raises(InvalidData, match="cannot be read: Is a directory") as caught:
        found_in(tmp_path)
    assert caught.value.code == "unreadable_file"
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(InvalidData, match="symbolic links"):
        found_in(loop)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_one_may_not_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row(1))
    path.chmod(0)
    with pytest.raises(InvalidData, match="Permission denied"):
        found_in(path)


def test_a_broken_archive_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(ALPACA), mtime=0)[:-5])
    with pytest.raises(InvalidData, match="ends early") as caught:
        found_in(path)
    assert caught.value.place.file == "rows.jsonl.gz"


def test_empty_and_blank_files_have_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content in (
        b"",
        b"\n \r\n\n",
        b"\xef\xbb\xbf",
        b"[]",
        b"[ ]\n",
        gzip.compress(b"", mtime=0),
    ):
        path.write_bytes(content)
        assert found_in(path) == []


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(ALPACA))
    before = path.stat()
    found_in(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (jsonl(ALPACA), before.st_mtime_ns)


def test_a_row_over_the_limit_is_counted_in_every_container(tmp_path: Path) -> None:
    rows = [ALPACA[0], {**ALPACA[1], "output": "x" * 500}, ALPACA[2]]
    limits = Limits(max_line_bytes=300)
    path = tmp_path / "rows"
    for content in (
        jsonl(rows), json.dumps(rows).encode(), json.dumps(rows, indent=2).encode(),
        gzip.compress(jsonl(rows), mtime=0),
    ):  # fmt: skip
        path.write_bytes(content)
        assert [code for _, code in found_in(path, limits=limits)] == ["ok", "line_too_long", "ok"]


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and more")
    with pytest.raises(InvalidConfig, match="rows.parquet is Parquet") as caught:
        found_in(path)
    assert "llamahome[parquet]" in str(caught.value.remedy)


def test_parquet_rows_are_read_in_order(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet brings pyarrow")
    files = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    rows = [json.loads(row(n)) for n in range(600)]
    files.write_table(arrow.Table.from_pylist(rows), path, row_group_size=100)
    found = list(read_conversations(path))
    assert [line for line, _ in found] == list(range(1, 601))
    assert all(isinstance(one, Conversation) for _, one in found)
    files.write_table(arrow.Table.from_pylist([{**ALPACA[0], "id": b"\xff"}, ALPACA[1]]), path)
    assert [code for _, code in found_in(path)] == ["invalid_json", "ok"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidData, match="cannot be read as Parquet"):
        found_in(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_rows_that_are_long_lists_are_no_array(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "rows"
    turns = [{"role": "user", "content": "x" * 200_000}, {"role": "assistant", "content": "y"}]
    path.write_bytes(pack(b"\n".join([json.dumps(turns).encode()] * 3)))
    with path.open("rb") as stream:
        assert examine(stream, filename="rows", limits=Limits()).layout == "jsonl"
    rows = [found for _, found in read_conversations(path)]
    assert [(found.line, found.code) for found in rows if isinstance(found, Rejected)] == [
        (1, "not_an_object"), (2, "not_an_object"), (3, "not_an_object")
    ]  # fmt: skip


DATA = os.environ.get("LLAMAHOME_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="LLAMAHOME_TEST_DATA names no folder of public sample files")
@pytest.mark.parametrize(
    ("name", "format", "rows"),
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("identity.json", "alpaca", 91),
    ],
)
def test_public_files_go_through_with_every_row(name: str, format: str, rows: int) -> None:
    path = Path(str(DATA)) / name
    with path.open("rb") as stream:
        assert examine(stream, filename=name, limits=Limits()).format == format
    kinds = Counter(type(found).__name__ for _, found in read_conversations(path))
    assert kinds.total() == rows == len(json.loads(path.read_bytes()))
    assert kinds == {"Conversation": rows}
