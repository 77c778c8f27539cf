"""What a file is wrapped in: plain or compressed, lines or one array, or Parquet.

Compressed files are unpacked as they are read, in bounded memory, and never beyond what their size
makes believable. An archive that cannot be unpacked to its end is refused as a whole: nobody can
say which rows it lost.
"""

from __future__ import annotations

import importlib
import io
import sys
import zlib
from typing import Any, BinaryIO, Protocol

import msgspec

from llamahome.conversations.strict_json import UNREADABLE
from llamahome.errors import InvalidConfig, InvalidData

LINES, ARRAY, PARQUET = "jsonl", "json", "parquet"
GZIP, ZSTD = "gz", "zst"
# What starts an archive. Zstandard may start with frames that hold no text (RFC 8878, 3.1.2).
_STARTS = (
    (b"\x1f\x8b", GZIP),
    (b"\x28\xb5\x2f\xfd", ZSTD),
    *((bytes([first]) + b"\x2a\x4d\x18", ZSTD) for first in range(0x50, 0x60)),
)
HEAD_BYTES = 64 * 1024
_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 256 * 1024
# Text packs 3 to 30 times; gzip's own limit is 1,032, that of Zstandard is over 30,000.
MAX_RATIO = 200
_RATIO_COUNTS_FROM = 64 * 1024 * 1024
MAX_UNPACKED_BYTES = 1024**4


def compression_of(head: bytes) -> str | None:
    """gz, zst or None."""
    return next((name for start, name in _STARTS if head.startswith(start)), None)


def head_of(stream: BinaryIO, *, max_line_bytes: int) -> bytes:
    """The first ``HEAD_BYTES`` from where ``stream`` stands. Where a bracket comes first, also the
    rest of its line, up to ``max_line_bytes``, and what follows: it may be a row, or hold all rows.
    """
    head = stream.read(HEAD_BYTES)
    text = _text_of(head)
    if text.startswith(b"[") and b"\n" not in text:
        head += stream.readline(max_line_bytes) + stream.read(HEAD_BYTES)
    return head


def _text_of(head: bytes) -> bytes:
    return head.removeprefix(_BOM).lstrip(b" \t\r\n")


def layout_of(head: bytes) -> str:
    """json where the (unpacked) text is one array of objects, parquet, else jsonl. ``head`` is as
    ``head_of`` gives it.
    """
    if head.startswith(b"PAR1"):
        return PARQUET
    text = _text_of(head)
    if not text.startswith(b"[") or _is_list_on_a_line(text):
        return LINES
    inside = text[1:].lstrip(b" \t\r\n")
    return ARRAY if inside.startswith(b"{") or inside.rstrip() in (b"", b"]") else LINES


def _is_list_on_a_line(text: bytes) -> bool:
    """Whether the first line is a whole list and more lines follow: then each line is a row."""
    line, _, rest = text.partition(b"\n")
    if not rest.strip():
        return False
    try:
        msgspec.json.decode(line)
    except UNREADABLE:
        return False
    return True


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor as the other ones are: it keeps what it has not yet unpacked."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full answer may have more behind it that needs no more input.
        self.needs_input = not self._inner.unconsumed_tail and len(found) < max_length
        return found


class Unpacked(io.RawIOBase):
    """The text inside a compressed stream; several archives in a row are one text.

    ``consumed`` is how many compressed bytes have been read. Raises InvalidData (broken_archive,
    archive_too_large) while reading.
    """

    def __init__(
        self,
        stream: BinaryIO,
        compression: str,
        *,
        filename: str,
        max_ratio: int = MAX_RATIO,
        max_bytes: int = MAX_UNPACKED_BYTES,
    ) -> None:
        self._stream, self._filename = stream, filename
        self._compression = compression
        self._max_ratio, self._max_bytes = max_ratio, max_bytes
        self._broken: tuple[type[Exception], ...] = (zlib.error,)
        if compression == ZSTD:
            self._zstd = _zstd_module(filename)
            self._broken = (self._zstd.ZstdError,)
        self._decoder: _Decoder | None = None
        self._waiting = b""
        self.consumed = self.produced = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._some(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _some(self, size: int) -> bytes:
        """Up to ``size`` bytes, b"" at the end."""
        while size:
            if (decoder := self._open_decoder()) is None:
                return b""
            data = self._waiting
            self._waiting = b""
            if decoder.needs_input and not data and not (data := self._read()):
                raise self._error("ends early; send it whole")
            try:
                found = decoder.decompress(data, size)
            except self._broken as error:
                raise self._error(f"cannot be unpacked: {error}") from None
            if found:
                self._check_size(len(found))
                return found
        return b""

    def _open_decoder(self) -> _Decoder | None:
        """The decoder to go on with; None at the end of the last archive."""
        decoder = self._decoder
        if decoder is not None and not decoder.eof:
            return decoder
        data = self._waiting if decoder is None else decoder.unused_data
        if decoder is not None and self._compression == GZIP:
            # Files on tape are filled up with zeros.
            data = data.lstrip(b"\0")
        while not data and (data := self._read()) and decoder is not None:
            data = data.lstrip(b"\0") if self._compression == GZIP else data
        if not data:
            return None
        self._waiting = data
        self._decoder = self._new_decoder()
        return self._decoder

    def _new_decoder(self) -> _Decoder:
        if self._compression == GZIP:
            return _Gzip()
        decoder: _Decoder = self._zstd.ZstdDecompressor()
        return decoder

    def _read(self) -> bytes:
        data = self._stream.read(_READ_BYTES)
        self.consumed += len(data)
        return data

    def _check_size(self, more: int) -> None:
        self.produced += more
        bound = max(_RATIO_COUNTS_FROM, self._max_ratio * self.consumed)
        if self.produced > min(bound, self._max_bytes):
            raise InvalidData(
                f"{self.consumed} bytes unpack to more than {self.produced - more}",
                code="archive_too_large", file=self._filename,
                remedy=f"At most {self._max_ratio} times and {self._max_bytes} bytes are unpacked; "
                "send it unpacked, or in parts",
            )  # fmt: skip

    def _error(self, what: str) -> InvalidData:
        return InvalidData(
            f"the .{self._compression} archive {what}", code="broken_archive", file=self._filename
        )


def _zstd_module(filename: str) -> Any:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InvalidConfig(
            f"{filename} is Zstandard, and {name} is not installed here",
            code="missing_extra", remedy="pip install 'llamahome[fleet]', or send the file as .gz",
        ) from None  # fmt: skip
