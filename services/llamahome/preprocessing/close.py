"""All token shards -> the two sides of the split, each one file, and the preparation report.

The artifact: ``training.safetensors``, ``validation.safetensors``, ``dropped.jsonl``,
``preparation.json`` (schemas.PreparationReport) and ``tokenizer/``. It is the same however many
shards there were: rows are ordered by content (conversations.split).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations import Split, dump, split_rows
from llamahome.conversations.tokenizer import TEMPLATE_FILE
from llamahome.conversations.tokens import TokenRows, TokenRowsWriter, read_token_rows
from llamahome.errors import InvalidData, Stopped
from llamahome.preprocessing.base import LoadedBase, load_base
from llamahome.preprocessing.shard import DROPPED_NAME, FACTS_NAME, HASHES_NAME, TOKENS_NAME
from llamahome.schemas import (
    JobSpec,
    Ports,
    PreparationReport,
    Rejected,
    SplitCounts,
    Stage,
    StageResult,
    StageTask,
    Step,
)

TRAINING_NAME = "training.safetensors"
VALIDATION_NAME = "validation.safetensors"
REPORT_NAME = "preparation.json"
TOKENIZER_FOLDER = "tokenizer"
_DIGEST_BYTES = 32
_BOUNDARY_ROWS = 1024


def close(task: StageTask, ports: Ports) -> StageResult:
    """Split, concatenate, report. Raises InvalidData where no training row is left, Stopped."""
    base = load_base(task)
    shards = _shards(task, ports)
    rows = _Rows(shards)
    split = _split(rows, task.spec)
    folder = ports.scratch / "prepared"
    folder.mkdir()
    _write_dropped(folder / DROPPED_NAME, shards)
    report = _report(rows, split, shards)
    if not split.training:
        raise _nothing_left(report, shards)
    _write_side(folder / TRAINING_NAME, rows, split.training, task, ports)
    _write_side(folder / VALIDATION_NAME, rows, split.validation, task, ports)
    (folder / REPORT_NAME).write_bytes(dump(report.model_dump(mode="json")) + b"\n")
    _copy_tokenizer(base, folder / TOKENIZER_FOLDER)
    _tell(report, task.spec, ports)
    summary = {
        **report.model_dump(mode="json"),
        "tokenizer_digest": base.tokenizer_digest,
        "template_digest": base.template_digest,
    }
    return StageResult(artifact=ports.publish(folder, "prepared"), summary=summary)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shard:
    split: str
    folder: Path
    rows_in: int
    dropped: Counter[str]


class _Rows:
    """All kept rows of all shards, numbered in source order.

    ``digests`` [n]; ``validation`` bool [n]: from a validation file; ``facts`` int64 [n, 3] as the
    shards have them.
    """

    def __init__(self, shards: Sequence[_Shard]) -> None:
        self._tokens: list[TokenRows] = []
        self.digests: list[bytes] = []
        facts: list[NDArray[np.int64]] = [np.zeros((0, 3), np.int64)]
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

    def place(self, number: int) -> tuple[TokenRows, int]:
        """The shard that holds row ``number``, and the row's index there."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._tokens[shard], number - int(self._starts[shard])


def _shards(task: StageTask, ports: Ports) -> list[_Shard]:
    """In the order in which they were planned, which is that of the files."""
    found = []
    for output in task.outputs_of(Stage.preprocessing, Step.shard):
        assert output.artifact is not None, "a preprocessing shard always has an artifact"
        found.append(
            _Shard(
                split=output.summary["split"], folder=ports.folder(output.artifact),
                rows_in=output.summary["rows_in"], dropped=Counter(output.summary["dropped"]),
            )
        )  # fmt: skip
    return found


def _split(rows: _Rows, spec: JobSpec) -> Split:
    """Given validation files are the validation side; else part of the training files is."""
    seed, keep = spec.config["seed"], spec.config["duplicates"] == "keep"
    if not spec.validation_files:
        share = spec.config["validation_split"]
        return split_rows(rows.digests, seed=seed, share=share, keep_duplicates=keep)
    sides = []
    for side in (False, True):
        numbers = np.flatnonzero(rows.validation == side).tolist()
        digests = [rows.digests[number] for number in numbers]
        part = split_rows(digests, seed=seed, share=0, keep_duplicates=keep)
        sides.append(
            (
                tuple(numbers[index] for index in part.training),
                tuple(numbers[index] for index in part.duplicates),
            )
        )
    (training, doubled), (validation, doubled_too) = sides
    return Split(training, validation, doubled + doubled_too)


def _write_side(
    path: Path, rows: _Rows, numbers: Sequence[int], task: StageTask, ports: Ports
) -> None:
    metadata = {"weight_scope": task.spec.config["loss_scope"]}
    with TokenRowsWriter(path, metadata=metadata) as writer:
        for done, number in enumerate(numbers):
            if done % _BOUNDARY_ROWS == 0:
                ports.progress(done, len(numbers), {"file": path.name})
                if reason := ports.should_stop():
                    raise Stopped(f"asked to stop: {reason}", code=reason)
            tokens, index = rows.place(number)
            writer.add(tokens.token_row(index))


def _write_dropped(path: Path, shards: Sequence[_Shard]) -> None:
    with path.open("wb") as out:
        for shard in shards:
            with (shard.folder / DROPPED_NAME).open("rb") as dropped:
                shutil.copyfileobj(dropped, out)


def _report(rows: _Rows, split: Split, shards: Sequence[_Shard]) -> PreparationReport:
    kept = np.array(split.training + split.validation, dtype=np.int64)
    stops, cut, neutralised = rows.facts[kept].T if len(kept) else np.zeros((3, 0), np.int64)
    dropped: Counter[str] = Counter()
    for shard in shards:
        dropped.update(shard.dropped)
    return PreparationReport(
        rows_in=sum(shard.rows_in for shard in shards),
        training=_counts(rows, split.training),
        validation=_counts(rows, split.validation),
        dropped=dict(sorted(dropped.items())),
        duplicates_dropped=len(split.duplicates),
        truncated_rows=int(np.count_nonzero(cut)),
        truncated_tokens=int(cut.sum()),
        control_tokens_neutralised=int(neutralised.sum()),
        stop_token_trained_share=int(stops.sum()) / len(kept) if len(kept) else None,
    )


def _counts(rows: _Rows, numbers: Sequence[int]) -> SplitCounts:
    tokens = trained = longest = 0
    for number in numbers:
        shard, index = rows.place(number)
        ids, mask = shard.row(index)
        tokens, trained = tokens + len(ids), trained + int(np.count_nonzero(mask))
        longest = max(longest, len(ids))
    return SplitCounts(rows=len(numbers), tokens=tokens, trained_tokens=trained, longest=longest)


def _nothing_left(report: PreparationReport, shards: Sequence[_Shard]) -> InvalidData:
    reasons = ", ".join(f"{code} {count}" for code, count in report.dropped.items()) or "none"
    example = _first_dropped(shards)
    only_untrained = set(report.dropped) == {"no_trained_token"}
    return InvalidData(
        f"no training row is left of {report.rows_in} rows (dropped: {reasons})"
        + (f"; the first: {example.reason}" if example else ""),
        code="no_trained_token" if only_untrained else "no_training_rows",
        file=example.file if example else None,
        line=example.line if example else None,
        remedy="Check loss_scope and the messages' weights" if only_untrained else None,
    )


def _first_dropped(shards: Sequence[_Shard]) -> Rejected | None:
    for shard in shards:
        with (shard.folder / DROPPED_NAME).open("rb") as dropped:
            if line := dropped.readline():
                return Rejected.model_validate_json(line)
    return None


def _copy_tokenizer(base: LoadedBase, folder: Path) -> None:
    folder.mkdir()
    for path in base.files:
        shutil.copyfile(path, folder / path.name)
    if not base.chat.has_template:
        # The adapter must be served with the template it was trained with.
        (folder / TEMPLATE_FILE).write_text(base.chat.template_source, encoding="utf-8")


def _tell(report: PreparationReport, spec: JobSpec, ports: Ports) -> None:
    ports.event(
        f"Prepared {report.training.rows} training rows ({report.training.trained_tokens} of "
        f"{report.training.tokens} tokens trained) and {report.validation.rows} validation rows"
    )
    if report.dropped:
        ports.event("Rows dropped", level="warn", data={"dropped": report.dropped})
    if report.truncated_rows:
        ports.event(
            f"{report.truncated_rows} rows cut to {spec.config['max_length']} tokens, "
            f"{report.truncated_tokens} tokens in all", level="warn",
        )  # fmt: skip
    share = report.stop_token_trained_share
    if share is not None and share < 1:
        ports.event(f"The stop token is trained in {share:.1%} of the rows", level="warn")
    if report.validation.rows == 0:
        ports.event("No validation rows: no evaluation, no early stopping", level="warn")
