"""All token shards -> the two sides of the split, each one file, and the preparation report.

The artifact: ``training.safetensors``, ``validation.safetensors``, ``packs.safetensors`` (with
``packing``: which training rows share a pack, conversations.packing), ``dropped.jsonl``,
``preparation.json`` (schemas.PreparationReport) and ``tokenizer/`` (with ``template: markers``, the
one with the markers). It is the same however many shards there were: rows are ordered by content
(conversations.split).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations import Split, dump, split_rows
from llamahome.conversations.base_files import (
    CONFIG_JSON,
    NAMES_JSON,
    TEMPLATE_FILE,
    TOKENIZER_JSON,
)
from llamahome.conversations.packing import plan_packs, write_packs
from llamahome.conversations.tokenizer import marked_files
from llamahome.conversations.tokens import TokenRowsWriter
from llamahome.errors import Stopped
from llamahome.preprocessing.base import LoadedBase, load_base, trim_heap
from llamahome.preprocessing.report import nothing_left, preparation_report, tell
from llamahome.preprocessing.shard import DROPPED_NAME
from llamahome.preprocessing.shards import Digests, Rows, Shard, proven_shards
from llamahome.schemas import JobSpec, Ports, StageResult, StageTask

TRAINING_NAME = "training.safetensors"
VALIDATION_NAME = "validation.safetensors"
PACKS_NAME = "packs.safetensors"
REPORT_NAME = "preparation.json"
TOKENIZER_FOLDER = "tokenizer"
_BOUNDARY_ROWS = 1024
# Rows are read from all over the shards, and each brings some 64 KiB around it into memory.
_BATCH_ROWS = 64


def close(task: StageTask, ports: Ports) -> StageResult:
    """Split, concatenate, report. Raises InvalidData where no training row is left, Stopped."""
    base, config = load_base(task), task.spec.config
    shards = proven_shards(task, ports)
    rows = Rows(shards)
    trim_heap()  # of many rows, what it took to sort them is as much as what is kept
    split = _split(rows, Digests(shards), task.spec)
    trim_heap()
    folder = ports.scratch / "prepared"
    folder.mkdir()
    _write_dropped(folder / DROPPED_NAME, shards)
    if not len(split.training):
        raise nothing_left(preparation_report(rows, split, shards, task.spec, None, base), shards)
    packs = None
    if config["packing"]:
        packs = plan_packs(rows.lengths[split.training], capacity=config["max_length"])
        write_packs(folder / PACKS_NAME, packs)
    training = _write_side(folder / TRAINING_NAME, rows, split.training, task, ports)
    validation = _write_side(folder / VALIDATION_NAME, rows, split.validation, task, ports)
    leaked = int(np.isin(validation, training).sum())
    report = preparation_report(rows, split, shards, task.spec, packs, base, leaked)
    (folder / REPORT_NAME).write_bytes(dump(report.model_dump(mode="json")) + b"\n")
    _copy_tokenizer(base, folder / TOKENIZER_FOLDER)
    tell(report, task.spec, ports)
    summary = {
        **report.model_dump(mode="json"),
        "tokenizer_digest": base.tokenizer_digest,
        "template_digest": base.template_digest,
    }
    return StageResult(artifact=ports.publish(folder, "prepared"), summary=summary)


def _split(rows: Rows, digests: Digests, spec: JobSpec) -> Split:
    """Given validation files are the validation side; else part of the training files is."""
    seed, keep = spec.config["seed"], spec.config["duplicates"] == "keep"
    if not spec.validation_files:
        share = spec.config["validation_split"]
        return split_rows(digests, seed=seed, share=share, keep_duplicates=keep)
    sides = []
    for side in (False, True):
        numbers = np.flatnonzero(rows.validation == side)
        of_side = [digests[int(number)] for number in numbers]
        part = split_rows(of_side, seed=seed, share=0, keep_duplicates=keep)
        sides.append((numbers[part.training], numbers[part.duplicates]))
    (training, doubled), (validation, doubled_too) = sides
    return Split(training, validation, np.concatenate([doubled, doubled_too]))


def _write_side(
    path: Path, rows: Rows, numbers: NDArray[np.int64], task: StageTask, ports: Ports
) -> NDArray[np.uint64]:
    """Digests of the rows' tokens, uint64 [n]: of a million rows on either side, two that differ
    have the same one once in 18 million jobs.
    """
    digests = np.empty(len(numbers), np.uint64)
    metadata = {"weight_scope": task.spec.config["loss_scope"]}
    with TokenRowsWriter(path, metadata=metadata) as writer:
        for done in range(0, len(numbers), _BATCH_ROWS):
            if done % _BOUNDARY_ROWS == 0:
                ports.progress(done, len(numbers), {"file": path.name})
                if reason := ports.should_stop():
                    raise Stopped(f"asked to stop: {reason}", code=reason)
            for at, row in enumerate(rows.token_rows(numbers[done : done + _BATCH_ROWS]), done):
                writer.add(row)
                digest = hashlib.blake2b(row.ids.tobytes(), digest_size=8).digest()
                digests[at] = int.from_bytes(digest, "little")
            rows.let_go()
    return digests


def _write_dropped(path: Path, shards: Sequence[Shard]) -> None:
    with path.open("wb") as out:
        for shard in shards:
            with (shard.folder / DROPPED_NAME).open("rb") as dropped:
                shutil.copyfileobj(dropped, out)


def _copy_tokenizer(base: LoadedBase, folder: Path) -> None:
    folder.mkdir()
    if base.markers is not None:
        document, config, _ = marked_files(base.files[TOKENIZER_JSON].parent)
        (folder / TOKENIZER_JSON).write_bytes(dump(document))
        (folder / CONFIG_JSON).write_bytes(dump(config))
        copied = [NAMES_JSON]
    else:
        copied = [*base.files]
    for name in copied:
        if name in base.files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base.files[name], folder / name)
    if not base.chat.has_template:
        # The adapter must be served with the template it was trained with.
        (folder / TEMPLATE_FILE).write_text(base.chat.template_source, encoding="utf-8")
