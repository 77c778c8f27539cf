"""Compressed files: the text inside, in bounded memory, or a clear refusal."""

from __future__ import annotations

import gzip
import importlib
import io
from collections import deque
from types import ModuleType
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.conversations.containers import Unpacked, compression_of
from llamahome.errors import InvalidConfig, InvalidData


def zstd() -> ModuleType:
    return cast(
        ModuleType,
        pytest.importorskip("backports.zstd", reason="the extra fleet brings backports.zstd"),
    )


def pack(text: bytes, compression: str) -> bytes:
    return gzip.compress(text) if compression == "gz" else zstd().compress(text)


def unpacked(raw: bytes | BinaryIO, compression: str, **bounds: int) -> io.BufferedReader:
    stream = io.BytesIO(raw) if isinstance(raw, bytes) else raw
    return io.BufferedReader(Unpacked(stream, compression, filename="rows", **bounds))


BOTH = pytest.mark.parametrize("compression", ["gz", "zst"])


@BOTH
def test_what_was_packed_comes_out_piece_by_piece(compression: str) -> None:
    text = b"".join(b"%d," % number for number in range(200_000))
    packed = pack(text, compression)
    assert compression_of(packed[:4]) == compression
    assert unpacked(packed, compression).read() == text
    stream = unpacked(packed, compression)
    assert b"".join(iter(lambda: stream.read(1000), b"")) == text
    assert unpacked(pack(b"", compression), compression).read() == b""


@BOTH
def test_several_archives_in_a_row_are_one_text(compression: str) -> None:
    packed = pack(b"one\n", compression) + pack(b"", compression) + pack(b"two\n", compression)
    assert unpacked(packed, compression).read() == b"one\ntwo\n"
    if compression == "gz":
        assert unpacked(packed + b"\0" * 1024, compression).read() == b"one\ntwo\n"


def skippable(content: bytes, variant: int = 0) -> bytes:
    """A frame that a reader of Zstandard must pass over (RFC 8878, 3.1.2)."""
    magic = (0x184D2A50 + variant).to_bytes(4, "little")
    return magic + len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize("variant", range(16))
def test_frames_to_pass_over_are_zstandard_too_wherever_they_stand(variant: int) -> None:
    frame, packed = skippable(b'{"a": 1}\n', variant), zstd().compress(b"one\n")
    assert compression_of(frame[:8]) == "zst"
    assert unpacked(frame + packed, "zst").read() == b"one\n"
    assert unpacked(frame + packed + frame + frame + packed, "zst").read() == b"one\none\n"
    for nothing in (frame, frame + skippable(b""), skippable(b"", variant)):
        assert unpacked(nothing, "zst").read() == b""
    for cut in (4, 6, len(frame) - 1):
        with pytest.raises(InvalidData, match="ends early"):
            unpacked(frame[:cut], "zst").read()


def test_what_only_resembles_such_a_frame_is_no_archive() -> None:
    for head in (b"\x60\x2a\x4d\x18", b"\x4f\x2a\x4d\x18", b"\x50\x2a\x4d", b"P*M\x19", b""):
        assert compression_of(head) is None


@BOTH
def test_a_broken_archive_is_refused_as_a_whole(compression: str) -> None:
    packed = pack(bytes(range(256)) * 500, compression)
    for cut in (5, len(packed) // 2, len(packed) - 1):
        with pytest.raises(InvalidData, match="ends early|cannot be unpacked") as caught:
            unpacked(packed[:cut], compression).read()
        assert caught.value.code == "broken_archive"
        assert caught.value.place.file == "rows"
    with pytest.raises(InvalidData, match="cannot be unpacked"):
        unpacked(packed + b"rubbish after the end", compression).read()


@BOTH
def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(compression: str) -> None:
    bomb = pack(bytes(80 * 1024 * 1024), compression)
    stream = unpacked(bomb, compression)
    with pytest.raises(InvalidData, match="bytes unpack to more than 67108864") as caught:
        deque(iter(lambda: stream.read(1024 * 1024), b""), maxlen=0)
    assert caught.value.code == "archive_too_large"
    with pytest.raises(InvalidData, match="unpack to more than"):
        unpacked(pack(b"x" * 1001, compression), compression, max_bytes=1000).read()
    assert unpacked(pack(b"x" * 1000, compression), compression, max_bytes=1000).read()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=4))
def test_no_bytes_crash_the_unpacking(text: bytes, at: int, change: bytes) -> None:
    packed = gzip.compress(text, mtime=0)
    packed = packed[:at] + change + packed[at + len(change) :]
    code = "broken_archive"
    try:
        unpacked(packed, "gz").read()
    except InvalidData as error:
        code = error.code
    assert code == "broken_archive"


def test_without_the_zstandard_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InvalidConfig, match=r"rows is Zstandard, and .*zstd is not") as caught:
        unpacked(b"\x28\xb5\x2f\xfd", "zst")
    assert caught.value.code == "missing_extra"
    assert "llamahome[fleet]" in str(caught.value.remedy)
