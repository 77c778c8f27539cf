"""Lines of byte ranges: any cut gives the same lines, in bounded memory."""

from __future__ import annotations

import io

import pytest

from llamahome.conversations import Limits, foreign_format, lines, lines_of_range, parse_row
from llamahome.schemas import Rejected


@pytest.mark.parametrize(
    ("head", "word"),
    [
        ("x".encode("utf-16"), "UTF-16"), ("x".encode("utf-32"), "UTF-32"),
        (b"\xfe\xff\0x", "UTF-16"), (b"PK\x03\x04", "zip"), (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named(head: bytes, word: str) -> None:
    foreign = foreign_format(head)
    assert foreign is not None
    found = parse_row(b"{}", file="f", line=1, limits=Limits(), foreign=foreign)
    assert isinstance(found, Rejected)
    assert word in found.reason
    assert foreign_format(b'{"me') is None
    assert foreign_format(b"\xef\xbb\xbf{") is None


FILE = (
    b'{"a": 1}\r\n\n  \n{"long": "'
    + b"x" * 90
    + b'"}\n\r\n{"b":2}\n\xff\xfe\n{"last": "no newline"}'
)


@pytest.mark.parametrize("content", [FILE, FILE + b"\n", b"", b"\n", b"\n\n\n", b"x"])
def test_byte_ranges_of_any_size_give_the_same_lines(content: bytes) -> None:
    limit = 50
    whole = list(lines_of_range(io.BytesIO(content), 0, len(content), max_line_bytes=limit))
    assert [raw for raw, _ in whole] == [
        line if len(line) <= limit else None
        for line in (raw.rstrip(b"\r\n") for raw in content.splitlines(keepends=True))
    ]
    for size in range(1, 65):
        found = [
            line
            for start in range(0, len(content), size)
            for line in lines_of_range(
                io.BytesIO(content), start, min(start + size, len(content)), max_line_bytes=limit
            )
        ]
        assert found == whole, size


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_line_of_exactly_the_limit_is_read_and_one_byte_more_is_not(ending: bytes) -> None:
    for length, fits in ((10, True), (11, False), (12, False), (13, False), (5000, False)):
        content = b"x" * length + ending + b"next"
        stream = io.BytesIO(content)
        found = [raw for raw, _ in lines_of_range(stream, 0, len(content), max_line_bytes=10)]
        if not ending:
            assert found == [None]
        else:
            assert found == [b"x" * 10 if fits else None, b"next"]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
def test_a_line_of_many_chunks_is_read_as_in_one(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    def read() -> list[list[tuple[bytes | None, int]]]:
        return [
            list(lines_of_range(io.BytesIO(FILE), 0, len(FILE), max_line_bytes=limit))
            for limit in (5, 50, 1000)
        ]

    whole = read()
    monkeypatch.setattr(lines, "_BEYOND_BYTES", chunk_bytes)
    monkeypatch.setattr(lines, "_CHUNK_BYTES", chunk_bytes)
    assert read() == whole


class CountingStream(io.BytesIO):
    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.largest = max(self.largest, len(found))
        return found

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.largest = max(self.largest, len(line))
        return line


def test_a_huge_line_is_never_held_whole() -> None:
    """BEHAVIOUR 38: bounded memory."""
    stream = CountingStream(b"x" * 5_000_000 + b"\nshort")
    found = list(lines_of_range(stream, 0, 5_000_006, max_line_bytes=1000))
    assert found == [(None, 5_000_001), (b"short", 5_000_006)]
    assert stream.largest <= 1024 * 1024


def test_a_line_over_many_ranges_is_read_by_none_of_them_to_its_end() -> None:
    content = b"x" * 3_000_000 + b"\n{}\n"
    read = []
    found = []
    for start in range(0, len(content), 100_000):
        stream = CountingStream(content)
        end = min(start + 100_000, len(content))
        found += [raw for raw, _ in lines_of_range(stream, start, end, max_line_bytes=1000)]
        read.append(stream.tell() - start)
    assert found == [None, b"{}"]
    assert max(read) <= 100_000 + 1024 * 1024
