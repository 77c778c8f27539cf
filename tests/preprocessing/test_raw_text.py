"""Jobs of raw text, from the file to the prepared rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.tokens import TokenRows, read_token_rows
from llamahome.errors import InvalidData
from llamahome.local import run_job
from llamahome.preprocessing import stage
from llamahome.schemas import (
    FileRef,
    JobSpec,
    PreparationReport,
    RunOutput,
    Stage,
    Step,
    ValidationReport,
)
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage as validation_stage
from support.bases import write_base
from support.data import job_spec, read_artifact, row, task_of, upload, upload_rows

STAGES = {
    Stage.validation: (validation_stage.run, validation_stage.key),
    Stage.preprocessing: (stage.run, stage.key),
}
Outputs = dict[Any, RunOutput]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "chatml")


def text(number: int, more: str = "", **keys: Any) -> bytes:
    return json.dumps({"text": f"Tale {number} of the fox. {more}", **keys}).encode()


def prepare(spec: JobSpec, storage: Storage, scratch: Path) -> Outputs:
    return run_job(spec, storage, scratch / "scratch", stages=STAGES)


def closed(outputs: Outputs) -> RunOutput:
    return outputs[Stage.preprocessing, Step.close, 0]


def sides(outputs: Outputs, storage: Storage, into: Path) -> tuple[TokenRows, TokenRows]:
    artifact = closed(outputs).artifact
    assert artifact is not None
    folder = storage.fetch(artifact, into)
    return (
        read_token_rows(folder / "training.safetensors"),
        read_token_rows(folder / "validation.safetensors"),
    )


def reports(
    outputs: Outputs, storage: Storage, into: Path
) -> tuple[ValidationReport, PreparationReport]:
    checked = outputs[Stage.validation, Step.close, 0]
    raw = read_artifact(storage, checked, "report.json", into)
    prepared = read_artifact(storage, closed(outputs), "preparation.json", into)
    return (
        ValidationReport.model_validate_json(raw),
        PreparationReport.model_validate_json(prepared),
    )


def ids_by_line(rows: TokenRows) -> dict[int, list[int]]:
    lines = rows.source_line.tolist()
    return {line: rows.row(index)[0].tolist() for index, line in enumerate(lines)}


def test_texts_become_sequences_that_are_trained_to_their_end(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    lines = [
        text(1), text(2), b"", text(1), text(3, "with </s> in it"), b'{"text": " "}',
        b'{"text": 5}', row(1), text(4, weight=0), *(text(n) for n in range(10, 20)),
    ]  # fmt: skip
    spec = job_spec([upload_rows(storage, lines)], base=base, duplicates="drop", shard_bytes=150)
    outputs = prepare(spec, storage, tmp_path)
    checked, report = reports(outputs, storage, tmp_path)
    assert checked.files[0].format == "text"
    assert checked.invalid == {"empty_content": 1, "invalid_content": 1, "mixed_format": 1}
    assert (checked.valid, checked.duplicates) == (15, 1)
    assert (report.rows_in, report.duplicates_dropped) == (15, 1)
    assert report.dropped == {"no_trained_token": 1}
    assert (report.training.rows, report.validation.rows) == (12, 1)
    assert report.training.trained_tokens == report.training.tokens
    assert report.stop_token_trained_share == 1.0
    assert report.control_tokens_neutralised == 1
    assert report.masks_agreed == 13
    chat = ChatBase.load(base)
    found: dict[int, list[int]] = {}
    for side in sides(outputs, storage, tmp_path):
        found |= ids_by_line(side)
        assert side.trained.all()
    kept = {n: line for n, line in enumerate(lines, 1) if n in (1, 2, 5, *range(10, 20))}
    assert found == {
        number: chat.tokenise(
            Conversation((), text=json.loads(line)["text"]), loss_scope="assistant"
        ).ids.tolist()
        for number, line in kept.items()
    }


def test_any_cut_and_any_container_of_it_give_the_same_rows(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    lines = [text(n) for n in range(12)]
    plain = b"\n".join(lines)
    files: list[tuple[FileRef, int]] = [
        (upload(storage, plain), 100),
        (upload(storage, plain), 10_000),
        (upload(storage, gzip.compress(plain, mtime=0), "rows.jsonl"), 100),
        (upload(storage, b"[" + b",\n".join(lines) + b"]"), 100),
    ]
    found = []
    for number, (file, size) in enumerate(files):
        spec = job_spec([file], base=base, shard_bytes=size)
        outputs = prepare(spec, storage, tmp_path / str(number))
        training, held = sides(outputs, storage, tmp_path)
        found.append((training.ids.tolist(), training.source_line.tolist(), held.ids.tolist()))
    assert all(it == found[0] for it in found)


def test_long_texts_are_cut_dropped_or_an_error(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    file = upload_rows(storage, [text(1, "so " * 100), text(2)])
    whole = ChatBase.load(base).tokenise(
        Conversation((), text=json.loads(text(1, "so " * 100))["text"]), loss_scope="all"
    )
    settings: dict[str, Any] = {"base": base, "max_length": 32, "validation_split": 0}
    cut = prepare(job_spec([file], too_long="truncate", **settings), storage, tmp_path)
    training, _ = sides(cut, storage, tmp_path)
    assert ids_by_line(training)[1] == whole.ids[:32].tolist()
    _, report = reports(cut, storage, tmp_path)
    assert (report.truncated_rows, report.truncated_tokens) == (1, len(whole.ids) - 32)
    assert report.stop_token_trained_share == 0.5
    dropped = prepare(job_spec([file], too_long="drop", **settings), storage, tmp_path)
    assert reports(dropped, storage, tmp_path)[1].dropped == {"too_long": 1}
    with pytest.raises(InvalidData, match=r"rows.jsonl:1.*max_length is 32"):
        prepare(job_spec([file], too_long="error", **settings), storage, tmp_path)


def test_fewer_texts_than_the_least_number_fail_the_job(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    file = upload_rows(storage, [text(n) for n in range(3)])
    prepare(job_spec([file], base=base, min_examples=3), storage, tmp_path)
    with pytest.raises(InvalidData, match="3 valid training rows") as failed:
        prepare(job_spec([file], base=base, min_examples=4), storage, tmp_path)
    assert failed.value.code == "invalid_n_examples"


def test_texts_may_train_what_conversations_validate(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    texts = upload_rows(storage, [text(n) for n in range(3)], "t.jsonl")
    talks = upload_rows(storage, [row(n) for n in range(2)], "v.jsonl")
    outputs = prepare(job_spec([texts], [talks], base=base), storage, tmp_path)
    checked, report = reports(outputs, storage, tmp_path)
    assert [file.format for file in checked.files] == ["text", "messages"]
    assert (report.training.rows, report.validation.rows) == (3, 2)


def test_what_the_tokenizer_sets_around_a_text_is_part_of_the_key_of_texts_alone(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    other = write_base(tmp_path / "other", "chatml")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(other / "tokenizer.json"))

    def keys(lines: list[bytes]) -> set[str]:
        found = set()
        for folder in (base, other):
            spec = job_spec([upload_rows(storage, lines)], base=folder)
            outputs = prepare(spec, storage, tmp_path / folder.name)
            inputs = [out for place, out in outputs.items() if place[0] is Stage.validation]
            plan = {"split": "training", "rows": 0, "index": 0, "first_line": 0}
            task = task_of(spec, Stage.preprocessing, Step.shard, plan, inputs)
            found.add(stage.key(task))
        return found

    assert len(keys([row(1), row(2)])) == 1
    assert len(keys([text(1), text(2)])) == 2


def test_a_text_begins_as_the_tokenizer_begins_one(storage: Storage, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", "chatml")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = job_spec([upload_rows(storage, [text(n) for n in range(4)])], base=folder)
    training, held = sides(prepare(spec, storage, tmp_path), storage, tmp_path)
    for side in (training, held):
        starts = side.offsets[:-1]
        assert (side.ids[starts] == 1).all()
        assert np.flatnonzero(~side.trained).tolist() == starts.tolist()
