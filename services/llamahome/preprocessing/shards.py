"""The token shards as the close step reads them: all kept rows, numbered in source order."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.tokens import TokenRow, read_token_rows
from llamahome.preprocessing.path import TEMPLATE
from llamahome.preprocessing.shard import (
    FACTS_NAME,
    HASHES_NAME,
    TOKENS_NAME,
    Facts,
    write_shard,
)
from llamahome.schemas import JsonObject, Ports, RunOutput, Stage, StageTask, Step

_DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One shard; ``path`` is how its rows became tokens."""

    split: str
    folder: Path
    rows_in: int
    dropped: Counter[str]
    path: str


class Digests(Sequence[bytes]):
    """The rows' canonical digests [n], in 32 bytes of memory each."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._raw = b"".join([(shard.folder / HASHES_NAME).read_bytes() for shard in shards])

    def __len__(self) -> int:
        return len(self._raw) // _DIGEST_BYTES

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return self._raw[places * _DIGEST_BYTES : (places + 1) * _DIGEST_BYTES]


class Rows:
    """``validation`` bool [n]: from a validation file; ``facts`` int32 [n, 5], the columns of
    ``shard.Facts``; ``lengths`` and ``trained`` int64 [n] in tokens.

    What is held in memory is 60 bytes a row; tokens stay in their files.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._tokens = [read_token_rows(shard.folder / TOKENS_NAME) for shard in shards]
        self.facts: NDArray[np.int32] = np.concatenate(
            [np.zeros((0, len(Facts._fields)), np.int32), *map(_facts, shards)]
        )
        self.validation = np.repeat(
            [shard.split == "validation" for shard in shards], [*map(len, self._tokens)]
        ).astype(np.bool_)
        none = np.zeros(0, np.int64)
        self.lengths = np.concatenate([none, *(t.lengths for t in self._tokens)])
        self.trained = np.concatenate([none, *(t.trained_counts() for t in self._tokens)])
        # Copies: what is asked for with every row must not go when the tokens are let go.
        self._begins = np.concatenate([none, *(t.offsets[:-1] for t in self._tokens)])
        self._lines = np.concatenate([none, *(t.source_line for t in self._tokens)])
        self._files = np.concatenate(
            [none[:0].astype(np.int32), *(t.source_file for t in self._tokens)]
        )
        self._starts = np.cumsum([0, *map(len, self._tokens)], dtype=np.int64)
        self.let_go()

    def token_rows(self, numbers: NDArray[np.int64]) -> Iterator[TokenRow]:
        """The rows of these ``numbers``, in their order."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        begins, lengths = self._begins[numbers], self.lengths[numbers]
        columns = (shards, begins, begins + lengths, self._files[numbers], self._lines[numbers])
        for shard, begin, end, file, line in zip(*(c.tolist() for c in columns), strict=True):
            ids, trained = self._tokens[shard].span(begin, end)
            yield TokenRow(ids, trained, file, line)

    def source(self, number: int) -> tuple[int, int]:
        """The index of row ``number``'s file on its side, and its line."""
        return int(self._files[number]), int(self._lines[number])

    def let_go(self) -> None:
        """Give back the memory of the tokens read so far."""
        for tokens in self._tokens:
            tokens.let_go()


def _facts(shard: Shard) -> NDArray[np.int32]:
    found: NDArray[np.int32] = np.load(shard.folder / FACTS_NAME, allow_pickle=False).astype(
        np.int32
    )
    return found


def proven_shards(task: StageTask, ports: Ports) -> list[Shard]:
    """In the order in which they were planned, which is that of the files.

    Where the fast path failed its proof in one shard, it is not trusted in any: the shards that
    took it are made again the slow way. Raises as ``shard.write_shard`` does.
    """
    outputs = list(task.outputs_of(Stage.preprocessing, Step.shard))
    slow = [output for output in outputs if output.summary["path"].startswith(TEMPLATE)]
    refused = slow[0].summary["path_reason"] if slow else None
    return [
        _again(output, task, ports, refused)
        if refused is not None and output not in slow
        else _shard(output.summary, _folder(output, ports))
        for output in outputs
    ]


def _folder(output: RunOutput, ports: Ports) -> Path:
    assert output.artifact is not None, "a preprocessing shard always has an artifact"
    return ports.folder(output.artifact)


def _shard(summary: JsonObject, folder: Path) -> Shard:
    return Shard(
        split=summary["split"], folder=folder, rows_in=summary["rows_in"],
        dropped=Counter(summary["dropped"]), path=summary["path"],
    )  # fmt: skip


def _again(output: RunOutput, task: StageTask, ports: Ports, refused: str) -> Shard:
    source = output.summary["source"]
    rows = next(
        found.shard for found in task.outputs_of(Stage.validation, Step.shard)
        if found.artifact and found.artifact.digest == source["digest"]
        and found.summary["index"] == source["index"]
    )  # fmt: skip
    plan = {**source["plan"], "rows": rows, "split": output.summary["split"]}
    shard = task.model_copy(update={"step": Step.shard, "shard": output.shard, "plan": plan})
    folder = ports.scratch / f"again-{output.shard}"
    return _shard(write_shard(shard, ports, folder, refused=refused), folder)
