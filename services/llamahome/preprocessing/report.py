"""What the close step reports: every row accounted for, and what a reader should look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations import Split
from llamahome.conversations.packing import Packs
from llamahome.errors import InvalidData
from llamahome.preprocessing.base import LoadedBase
from llamahome.preprocessing.path import FAST
from llamahome.preprocessing.shard import DROPPED_NAME, Facts
from llamahome.preprocessing.shards import Rows, Shard
from llamahome.schemas import (
    JobSpec,
    MarkerTokens,
    PackingCounts,
    Ports,
    PreparationReport,
    Rejected,
    SplitCounts,
    TruncatedRow,
)

_EXAMPLES = 5


def preparation_report(
    rows: Rows,
    split: Split,
    shards: Sequence[Shard],
    spec: JobSpec,
    packs: Packs | None,
    base: LoadedBase,
    leaked: int = 0,
) -> PreparationReport:
    """Raises ValueError where the rows do not add up (our mistake, never the data's)."""
    kept = np.concatenate([split.training, split.validation])
    facts = Facts(*rows.facts[kept].T)
    dropped: Counter[str] = Counter()
    for shard in shards:
        dropped.update(shard.dropped)
    return PreparationReport(
        rows_in=sum(shard.rows_in for shard in shards),
        training=_counts(rows, split.training),
        validation=_counts(rows, split.validation),
        dropped=dict(sorted(dropped.items())),
        duplicates_dropped=len(split.duplicates),
        leaked=leaked,
        truncated_rows=int(np.count_nonzero(facts.tokens_cut)),
        truncated_tokens=int(np.sum(facts.tokens_cut)),
        control_tokens_neutralised=int(np.sum(facts.neutralised)),
        stop_token_trained_share=float(np.mean(facts.stop_is_trained)) if len(kept) else None,
        path=next((shard.path for shard in shards if shard.path != FAST), FAST),
        slow_rows=int(np.sum(facts.slow)),
        masks_agreed=int(np.sum(facts.agreed)),
        truncated_examples=_truncated(rows, kept, spec),
        packing=_packing(packs),
        markers=_markers(base),
    )


def _markers(base: LoadedBase) -> MarkerTokens | None:
    markers = base.markers
    if markers is None:
        return None
    new = ", ".join(markers.added)
    return MarkerTokens(
        ids=markers.ids, added_tokens=markers.added, base_vocabulary=markers.base_vocabulary,
        base_embeddings=base.vocabulary,
        not_servable_by_vllm=(
            f"the adapter brings embeddings of its own for {new}, and vLLM loads adapters that "
            "leave the embeddings as they are; load it with PEFT, or merge it into the base"
        ) if new else None,
    )  # fmt: skip


def _truncated(rows: Rows, kept: NDArray[np.int64], spec: JobSpec) -> tuple[TruncatedRow, ...]:
    """The first of them, in source order."""
    cut = rows.facts[:, Facts._fields.index("tokens_cut")]
    found = []
    for number in np.sort(kept[cut[kept] > 0])[:_EXAMPLES].tolist():
        file, line = rows.source(number)
        files = spec.validation_files if rows.validation[number] else spec.training_files
        length = int(rows.lengths[number])
        found.append(
            TruncatedRow(
                file=files[file].filename, line=line, tokens=length + int(cut[number]), kept=length,
            )
        )  # fmt: skip
    return tuple(found)


def _packing(packs: Packs | None) -> PackingCounts | None:
    if packs is None:
        return None
    return PackingCounts(packs=len(packs), capacity=packs.capacity, fill=packs.fill)


def _counts(rows: Rows, numbers: NDArray[np.int64]) -> SplitCounts:
    lengths = rows.lengths[numbers]
    return SplitCounts(
        rows=len(numbers), tokens=int(lengths.sum()),
        trained_tokens=int(rows.trained[numbers].sum()), longest=int(lengths.max(initial=0)),
    )  # fmt: skip


def nothing_left(report: PreparationReport, shards: Sequence[Shard]) -> InvalidData:
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


def _first_dropped(shards: Sequence[Shard]) -> Rejected | None:
    for shard in shards:
        with (shard.folder / DROPPED_NAME).open("rb") as dropped:
            if line := dropped.readline():
                return Rejected.model_validate_json(line)
    return None


def tell(report: PreparationReport, spec: JobSpec, ports: Ports) -> None:
    ports.event(
        f"Prepared {report.training.rows} training rows ({report.training.trained_tokens} of "
        f"{report.training.tokens} tokens trained) and {report.validation.rows} validation rows"
    )
    if report.path != FAST:
        ports.event(f"Tokenised without the fast path: {report.path}", data={"path": report.path})
    if report.dropped:
        ports.event("Rows dropped", level="warn", data={"dropped": report.dropped})
    if report.leaked:
        ports.event(
            f"{report.leaked} validation rows become the same tokens as a training row, so the "
            "validation loss will look better than it is", level="warn",
        )  # fmt: skip
    if report.truncated_rows:
        ports.event(
            f"{report.truncated_rows} rows cut to {spec.config['max_length']} tokens, "
            f"{report.truncated_tokens} tokens in all", level="warn",
        )  # fmt: skip
    share = report.stop_token_trained_share
    if share is not None and share < 1:
        ports.event(f"The stop token is trained in {share:.1%} of the rows", level="warn")
    if report.markers is not None and (why := report.markers.not_servable_by_vllm):
        ports.event(
            f"With template: markers the result cannot be served by vLLM: {why}", level="warn",
            data={"markers": report.markers.model_dump(mode="json")},
        )  # fmt: skip
    if report.validation.rows == 0:
        ports.event("No validation rows: no evaluation, no early stopping", level="warn")
