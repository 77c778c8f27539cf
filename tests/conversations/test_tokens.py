"""The token-shard layout: what is written is read back, and damage is found before use."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llamahome.conversations.tokens import (
    TokenRow,
    TokenRowsWriter,
    read_token_rows,
    write_token_rows,
)
from llamahome.errors import CorruptArtifact


def rows_of(lengths: list[int], seed: int = 0) -> list[TokenRow]:
    random = np.random.default_rng(seed)
    return [
        TokenRow(
            random.integers(0, 50_000, n).astype(np.int32),
            random.integers(0, 2, n).astype(np.bool_),
            source_file=index % 3,
            source_line=index + 1,
        )
        for index, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("lengths", [[], [1], [8], [7, 9, 0, 3], [1, 2, 3, 4, 5, 6, 7]])
def test_rows_are_read_back_as_they_were_written(tmp_path: Path, lengths: list[int]) -> None:
    rows = rows_of(lengths)
    write_token_rows(tmp_path / "t.safetensors", rows, metadata={"weight_scope": "assistant"})
    found = read_token_rows(tmp_path / "t.safetensors")
    assert len(found) == len(rows)
    assert found.metadata == {"weight_scope": "assistant"}
    assert found.total_tokens == sum(lengths)
    assert found.total_trained == sum(int(row.trained.sum()) for row in rows)
    assert found.lengths.tolist() == lengths
    assert found.trained_counts().tolist() == [int(row.trained.sum()) for row in rows]
    for index, row in enumerate(rows):
        ids, trained = found.row(index)
        assert ids.dtype == np.int32
        assert trained.dtype == np.bool_
        assert ids.tolist() == row.ids.tolist()
        assert trained.tolist() == row.trained.tolist()
        whole = found.token_row(index - len(rows))
        assert (whole.source_file, whole.source_line) == (row.source_file, row.source_line)


def test_a_row_outside_is_an_index_error(tmp_path: Path) -> None:
    write_token_rows(tmp_path / "t", rows_of([2, 3]))
    found = read_token_rows(tmp_path / "t")
    assert found.row(-1)[0].tolist() == found.row(1)[0].tolist()
    for outside in (2, -3):
        with pytest.raises(IndexError, match=f"row {outside} of 2"):
            found.row(outside)


def test_the_file_is_what_safetensors_itself_reads(tmp_path: Path) -> None:
    write_token_rows(tmp_path / "t", rows_of([5, 6]))
    tensors = load_file(tmp_path / "t")
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "ids": ("int32", (11,)),
        "trained": ("uint8", (2,)),
        "offsets": ("int64", (3,)),
        "source_file": ("int32", (2,)),
        "source_line": ("int64", (2,)),
    }


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    write_token_rows(tmp_path / "a", rows_of([5, 6]), metadata={"b": "1", "a": "2"})
    write_token_rows(tmp_path / "b", rows_of([5, 6]), metadata={"a": "2", "b": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_ids_and_trained_must_have_one_shape(tmp_path: Path) -> None:
    row = TokenRow(np.zeros(3, np.int32), np.zeros(2, np.bool_))
    with pytest.raises(ValueError, match=r"\(3,\), trained \(2,\)"):
        write_token_rows(tmp_path / "t", [row])
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes: what a full disk is to one who writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Buffers are 1 MiB: of few tokens none is written before the end, of many some are.
@pytest.mark.parametrize("lengths", [[700], [700_000]])
@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 0.99])
def test_on_a_full_disk_nothing_torn_stays(
    tmp_path: Path, lengths: list[int], share: float
) -> None:
    rows = rows_of(lengths)
    write_token_rows(tmp_path / "t", rows)
    size = (tmp_path / "t").stat().st_size
    (tmp_path / "t").unlink()
    with (
        files_up_to(int(size * share)),
        pytest.raises(OSError, match=f"Errno {errno.EFBIG}"),
    ):
        write_token_rows(tmp_path / "t", rows)
    assert list(tmp_path.iterdir()) == []


def test_the_error_that_ended_the_writing_is_seen_and_not_that_of_a_full_disk(
    tmp_path: Path,
) -> None:
    def failing() -> None:
        with TokenRowsWriter(tmp_path / "t") as writer:
            for row in rows_of([70_000]):
                writer.add(row)
            raise KeyError("mine")

    with files_up_to(100), pytest.raises(KeyError, match="mine"):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_what_stood_there_stays_where_the_rows_end_early(tmp_path: Path) -> None:
    write_token_rows(tmp_path / "t", rows_of([3]))
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(ValueError, match="shape"):
        write_token_rows(tmp_path / "t", [TokenRow(np.zeros(3, np.int32), np.zeros(2, np.bool_))])
    assert (tmp_path / "t").read_bytes() == before


def test_many_tokens_are_packed_across_chunks(tmp_path: Path) -> None:
    rows = rows_of([700_001, 700_002, 700_000])
    write_token_rows(tmp_path / "t", rows)
    found = read_token_rows(tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    for index, row in enumerate(rows):
        assert np.array_equal(found.row(index)[0], row.ids)
        assert np.array_equal(found.row(index)[1], row.trained)


def test_every_truncation_is_found_before_use(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_token_rows(path, rows_of([3, 4]))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptArtifact):
            read_token_rows(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"I32"', b'"F32"'),
        (b'"ids"', b'"idz"'),
        (b'"shape":[3]', b'"shape":[2]'),
        (b'"shape":[3]', b'"shape":[""'),
        (b'"data_offsets"', b'"data_offzets"'),
    ],
)
def test_a_header_that_disagrees_with_the_data_is_refused(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    path = tmp_path / "t"
    write_token_rows(path, rows_of([3, 4]))
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(CorruptArtifact):
        read_token_rows(path)


def test_rows_can_be_read_again_after_their_memory_was_given_back(tmp_path: Path) -> None:
    rows = rows_of([5, 6])
    write_token_rows(tmp_path / "t", rows)
    found = read_token_rows(tmp_path / "t")
    first = found.row(1)[0]
    found.let_go()
    assert first.tolist() == rows[1].ids.tolist()
    assert found.row(1)[1].tolist() == rows[1].trained.tolist()
    assert found.trained.tolist() == [flag for row in rows for flag in row.trained.tolist()]


def test_bits_beyond_the_last_token_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_token_rows(path, rows_of([3, 4]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] | 0x80]))
    with pytest.raises(CorruptArtifact, match="beyond the last token"):
        read_token_rows(path)


def test_offsets_out_of_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_token_rows(path, rows_of([3, 4]))
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[: start + 8] + (9).to_bytes(8, "little") + whole[start + 16 :])
    with pytest.raises(CorruptArtifact, match="offsets"):
        read_token_rows(path)
