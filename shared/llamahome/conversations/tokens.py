"""Token rows on disk: one safetensors file, written once, read through a memory map.

Tensors (little-endian, in this order): ``offsets`` int64 [rows + 1], ``source_line`` int64 [rows],
``ids`` int32 [tokens], ``source_file`` int32 [rows], ``trained`` uint8 [ceil(tokens / 8)], one bit
a token, lowest bit first. Row ``i`` is ``ids[offsets[i]:offsets[i + 1]]``. The header and its
``__metadata__`` hold names only, so equal rows give equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import mmap
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from llamahome.errors import CorruptArtifact

__all__ = ["TokenRow", "TokenRows", "TokenRowsWriter", "read_token_rows", "write_token_rows"]

_MAX_HEADER_BYTES = 1_000_000
_CHUNK_BYTES = 1024 * 1024
_WAITING_TOKENS = 64 * 1024
_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
# Widest first, so that every tensor starts aligned to its own width.
_LAYOUT = (
    ("offsets", "I64"),
    ("source_line", "I64"),
    ("ids", "I32"),
    ("source_file", "I32"),
    ("trained", "U8"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised conversation: ``ids`` int32 [n], ``trained`` bool [n], and where it stood.

    ``source_file`` is the index of the file in its side's list of files; ``source_line`` is
    1-based.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    source_file: int = 0
    source_line: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of one file, which stays mapped: ``ids`` int32 [tokens], ``offsets`` int64 [rows + 1],
    ``packed`` uint8 [ceil(tokens / 8)] the trained tokens' bits, ``source_file`` int32 [rows],
    ``source_line`` int64 [rows].
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    packed: NDArray[np.uint8]
    source_file: NDArray[np.int32]
    source_line: NDArray[np.int64]
    metadata: Mapping[str, str]
    mapped: mmap.mmap

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """``(ids int32 [n], trained bool [n])`` of row ``index``; the ids are a view.

        Raises IndexError outside ``[-len, len)``.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self.span(int(self.offsets[index]), int(self.offsets[index + 1]))

    def span(self, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The tokens [start, end), as :meth:`row` gives them."""
        bits = np.unpackbits(self.packed[start // 8 : (end + 7) // 8], bitorder="little")
        first = start % 8
        return self.ids[start:end], bits[first : first + end - start].view(np.bool_)

    def token_row(self, index: int) -> TokenRow:
        """Row ``index`` with its source. Raises IndexError."""
        ids, trained = self.row(index)
        return TokenRow(ids, trained, int(self.source_file[index]), int(self.source_line[index]))

    def let_go(self) -> None:
        """Give back the memory of what was read; the next reading takes it from the file again."""
        self.mapped.madvise(mmap.MADV_DONTNEED)

    @functools.cached_property
    def trained(self) -> NDArray[np.bool_]:
        """Bool [tokens], unpacked when first asked for: a byte of memory a token."""
        bits = np.unpackbits(self.packed, count=self.total_tokens, bitorder="little")
        return bits.view(np.bool_)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def trained_counts(self) -> NDArray[np.int64]:
        """Trained tokens of each row, int64 [rows]."""
        counts = np.cumsum(np.bitwise_count(self.packed), dtype=np.int64)
        byte, bit = np.divmod(self.offsets, 8)
        below = np.append(self.packed, np.uint8(0))[byte] & ((1 << bit) - 1).astype(np.uint8)
        before: NDArray[np.int64] = np.append(np.int64(0), counts)[byte] + np.bitwise_count(below)
        return np.diff(before)

    @property
    def total_tokens(self) -> int:
        return len(self.ids)

    @property
    def total_trained(self) -> int:
        return int(np.bitwise_count(self.packed).sum(dtype=np.int64))


class TokenRowsWriter:
    """Writes rows as they come, in memory that grows with the rows (24 B each), not the tokens.

    Tokens wait in two nameless files beside ``path`` until the header is known, at the end of the
    ``with`` block that this is to be used in. After an exception nothing torn is left behind, and a
    file that stood at ``path`` before is still there where the rows ended early.
    """

    def __init__(self, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Raises OSError."""
        self._path = path
        self._metadata = dict(metadata or {})
        self._lengths, self._files, self._lines = (array("q") for _ in range(3))
        # Rows that wait to be written together, and their tokens.
        self._waiting: list[TokenRow] = []
        self._waiting_tokens = 0
        with ExitStack() as opened:
            self._ids, self._trained = (opened.enter_context(_spool(path.parent)) for _ in range(2))
            opened.pop_all()

    def __len__(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> TokenRowsWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._assemble()
        finally:
            for spool in (self._ids, self._trained):
                # What it has not written is not wanted; the error to see is the one that ended us.
                with suppress(OSError):
                    spool.close()

    def add(self, row: TokenRow) -> None:
        """Append a row, whose arrays must stay as they are until the block ends.

        Raises ValueError where ids and trained differ in shape, and OSError.
        """
        if row.ids.ndim != 1 or row.ids.shape != row.trained.shape:
            raise ValueError(f"ids have shape {row.ids.shape}, trained {row.trained.shape}")
        self._lengths.append(len(row.ids))
        self._files.append(row.source_file)
        self._lines.append(row.source_line)
        self._waiting.append(row)
        self._waiting_tokens += len(row.ids)
        if self._waiting_tokens >= _WAITING_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            ids = np.concatenate([row.ids for row in self._waiting])
            trained = np.concatenate([row.trained for row in self._waiting])
            self._ids.write(ids.astype(_DTYPES["I32"], copy=False).data)
            self._trained.write(trained.astype(np.bool_, copy=False).data)
        self._waiting, self._waiting_tokens = [], 0

    def _assemble(self) -> None:
        out = self._path.open("wb")
        try:
            with out:
                self._write_all(out)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise

    def _write_all(self, out: BinaryIO) -> None:
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths, dtype=np.int64)])
        rows, tokens = len(self._lengths), int(offsets[-1])
        sizes = {
            "offsets": rows + 1, "source_line": rows, "ids": tokens, "source_file": rows,
            "trained": math.ceil(tokens / 8),
        }  # fmt: skip
        out.write(_header(sizes, self._metadata))
        out.write(offsets.astype(_DTYPES["I64"], copy=False).tobytes())
        out.write(np.array(self._lines, dtype=_DTYPES["I64"]).tobytes())
        self._ids.seek(0)
        shutil.copyfileobj(self._ids, out, _CHUNK_BYTES)
        out.write(np.array(self._files, dtype=_DTYPES["I32"]).tobytes())
        self._trained.seek(0)
        # A multiple of 8, so that only the last byte of all is padded.
        while chunk := self._trained.read(_CHUNK_BYTES):
            bits = np.frombuffer(chunk, dtype=np.bool_)
            out.write(np.packbits(bits, bitorder="little").tobytes())


def _spool(folder: Path) -> BinaryIO:
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=_CHUNK_BYTES, dir=folder))


def write_token_rows(
    path: Path, rows: Iterable[TokenRow], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``rows`` in their order. Raises ValueError (shapes differ) and OSError."""
    with TokenRowsWriter(path, metadata=metadata) as writer:
        for row in rows:
            writer.add(row)


def read_token_rows(path: Path) -> TokenRows:
    """Map the file and check its layout. Raises CorruptArtifact naming what is wrong, and OSError.

    An empty set of rows is fine: ``offsets`` is then ``[0]``.
    """
    size = path.stat().st_size
    with path.open("rb") as source:
        header, start = _read_header(source, size, path)
        mapped = mmap.mmap(source.fileno(), size, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    arrays = {name: _map(path, mapped, header, name, code, start) for name, code in _LAYOUT}
    _check(path, arrays)
    return TokenRows(
        ids=arrays["ids"], offsets=arrays["offsets"], packed=arrays["trained"],
        source_file=arrays["source_file"], source_line=arrays["source_line"],
        metadata=metadata if isinstance(metadata, dict) else {}, mapped=mapped,
    )  # fmt: skip


def _header(sizes: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, code in _LAYOUT:
        start, end = end, end + sizes[name] * _DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": [sizes[name]], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(source: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(source.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise CorruptArtifact(f"header of {length} bytes in {size} bytes", file=path.name)
    try:
        header = json.loads(source.read(length))
    except ValueError as error:
        raise CorruptArtifact(f"unreadable header: {error}", file=path.name) from None
    if not isinstance(header, dict):
        raise CorruptArtifact("the header is no object", file=path.name)
    return header, 8 + length


def _map(
    path: Path, mapped: mmap.mmap, header: Mapping[str, Any], name: str, code: str, start: int
) -> NDArray[Any]:
    try:
        entry = header[name]
        found, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CorruptArtifact("tensor is missing or broken", file=path.name, field=name) from None
    dtype, size = _DTYPES[code], len(mapped)
    whole = all(isinstance(number, int) for number in (begin, end, *shape))
    if found != code or not whole or len(shape) != 1 or shape[0] < 0 or begin < 0:
        raise CorruptArtifact(
            f"{found} {shape} where {code} [n] belongs", file=path.name, field=name
        )
    if end - begin != shape[0] * dtype.itemsize or start + end > size:
        raise CorruptArtifact(
            f"{shape[0]} elements of {dtype.itemsize} bytes in {begin}..{end} of a file with "
            f"{size} bytes", file=path.name, field=name,
        )  # fmt: skip
    if shape[0] == 0:
        return np.zeros(0, dtype)
    return np.frombuffer(mapped, dtype, count=shape[0], offset=start + begin)


def _check(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    offsets, tokens = arrays["offsets"], len(arrays["ids"])
    rows = len(offsets) - 1
    if rows < 0 or offsets[0] != 0 or offsets[-1] != tokens or np.any(np.diff(offsets) < 0):
        raise CorruptArtifact(
            f"offsets do not cover {tokens} tokens in order", file=path.name, field="offsets"
        )
    sizes = {"trained": math.ceil(tokens / 8), "source_file": rows, "source_line": rows}
    for name, expected in sizes.items():
        if len(arrays[name]) != expected:
            raise CorruptArtifact(
                f"{len(arrays[name])} elements, expected {expected}", file=path.name, field=name
            )
    if tokens % 8 and arrays["trained"][-1] >> tokens % 8:
        raise CorruptArtifact("bits beyond the last token", file=path.name, field="trained")
