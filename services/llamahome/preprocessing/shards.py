"""The token shards as the close step reads them: all kept rows, numbered in source order."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.tokens import TokenRows, read_token_rows
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


class Rows:
    """``digests`` [n]; ``validation`` bool [n]: from a validation file; ``facts`` int64 [n, 5],
    the columns of ``shard.Facts``; ``lengths`` int64 [n] in tokens.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._tokens: list[TokenRows] = []
        self.digests: list[bytes] = []
        facts: list[NDArray[np.int64]] = [np.zeros((0, len(Facts._fields)), np.int64)]
        given: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        for shard in shards:
            tokens = read_token_rows(shard.folder / TOKENS_NAME)
            raw = (shard.folder / HASHES_NAME).read_bytes()
            self._tokens.append(tokens)
            self.digests += [raw[i : i + _DIGEST_BYTES] for i in range(0, len(raw), _DIGEST_BYTES)]
            facts.append(np.load(shard.folder / FACTS_NAME, allow_pickle=False))
            given.append(np.full(len(tokens), shard.split == "validation"))
        self.facts = np.concatenate(facts)
        self.validation = np.concatenate(given)
        counts = [len(tokens) for tokens in self._tokens]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(t.lengths for t in self._tokens)])

    def place(self, number: int) -> tuple[TokenRows, int]:
        """The shard that holds row ``number``, and the row's index there."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._tokens[shard], number - int(self._starts[shard])


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
