"""Jobs with ``template: markers``: the tokenizer that training gets, and what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.markers import MARKERS, MARKERS_TEMPLATE
from llamahome.conversations.tokens import read_token_rows
from llamahome.errors import InvalidConfig
from llamahome.local import run_job
from llamahome.preprocessing import stage
from llamahome.schemas import (
    JobSpec,
    NewEvent,
    PreparationReport,
    RunOutput,
    Stage,
    Step,
)
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage as validation_stage
from support.bases import write_base
from support.data import job_spec, row, task_of, upload_rows

STAGES = {
    Stage.validation: (validation_stage.run, validation_stage.key),
    Stage.preprocessing: (stage.run, stage.key),
}
SIZE = 526  # tokens of the byte-level base, as a model for it would have embeddings
IDS = dict(zip(MARKERS, range(SIZE, SIZE + 4), strict=True))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_base(tmp_path / "base", "chatml")
    (folder / "config.json").write_text(json.dumps({"vocab_size": SIZE}))
    (folder / "chat_template.jinja").write_text("{{ 'the base has one of its own' }}")
    return folder


def prepare(
    spec: JobSpec, storage: Storage, scratch: Path, events: list[NewEvent] | None = None
) -> dict[Any, RunOutput]:
    return run_job(
        spec, storage, scratch / "scratch", stages=STAGES,
        on_event=lambda _, event: events.append(event) if events is not None else None,
    )  # fmt: skip


def folder_of(outputs: dict[Any, RunOutput], storage: Storage, into: Path) -> Path:
    artifact = outputs[Stage.preprocessing, Step.close, 0].artifact
    assert artifact is not None
    return storage.fetch(artifact, into)


@pytest.mark.model
def test_the_prepared_tokenizer_gives_the_prepared_ids_in_transformers(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 48: the tokenizer beside the data gives their ids."""
    from transformers import AutoTokenizer

    rows = [row(n) for n in range(6)]
    spec = job_spec([upload_rows(storage, rows)], base=base, template="markers", validation_split=0)
    folder = folder_of(prepare(spec, storage, tmp_path), storage, tmp_path)
    names = sorted(path.name for path in (folder / "tokenizer").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    oracle = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert oracle.chat_template == MARKERS_TEMPLATE
    assert oracle.convert_tokens_to_ids(list(MARKERS)) == list(IDS.values())
    training = read_token_rows(folder / "training.safetensors")
    assert len(training) == 6
    for index in range(6):
        messages = json.loads(rows[training.source_line[index] - 1])["messages"]
        wanted: Any = oracle.apply_chat_template(messages, tokenize=True, return_dict=True)
        ids, trained = training.row(index)
        assert ids.tolist() == wanted["input_ids"]
        answer = ids[trained].tolist()
        assert answer[-2:] == [IDS["<|endassistant|>"], oracle.eos_token_id]
        assert oracle.decode(answer[:-2]) == messages[1]["content"]
        assert ids[~trained].tolist()[-1] == IDS["<|assistant|>"]


def test_the_report_names_the_new_ids_and_who_cannot_serve_them(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    spec = job_spec([upload_rows(storage, [row(1), row(2)])], base=base, template="markers")
    events: list[NewEvent] = []
    outputs = prepare(spec, storage, tmp_path, events)
    raw = (folder_of(outputs, storage, tmp_path) / "preparation.json").read_bytes()
    markers = PreparationReport.model_validate_json(raw).markers
    assert markers is not None
    assert markers.ids == markers.added_tokens == IDS
    assert (markers.base_vocabulary, markers.base_embeddings) == (SIZE, SIZE)
    assert "vLLM" in (markers.not_servable_by_vllm or "")
    summary = outputs[Stage.preprocessing, Step.close, 0].summary
    assert summary["markers"] == markers.model_dump(mode="json")
    chat = ChatBase.load(base, markers=True)
    assert summary["tokenizer_digest"] == chat.tokenizer_digest
    assert summary["template_digest"] == chat.template_digest
    assert any(event.level == "warn" and "vLLM" in event.message for event in events)
    assert json.loads(raw)["path"] == "fast"


def test_without_markers_the_report_is_as_it_was(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    (base / "chat_template.jinja").unlink()
    spec = job_spec([upload_rows(storage, [row(1)])], base=base)
    outputs = prepare(spec, storage, tmp_path)
    raw = (folder_of(outputs, storage, tmp_path) / "preparation.json").read_bytes()
    assert "markers" not in json.loads(raw)
    assert "markers" not in outputs[Stage.preprocessing, Step.close, 0].summary
    assert PreparationReport.model_validate_json(raw).markers is None


def test_only_markers_may_have_no_embedding_yet(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    (base / "config.json").write_text('{"vocab_size": 300}')
    spec = job_spec([upload_rows(storage, [row(1)])], base=base, template="markers")
    with pytest.raises(InvalidConfig, match="the model has 300 embeddings") as failed:
        prepare(spec, storage, tmp_path)
    assert not any(str(id) in failed.value.message for id in IDS.values())


def test_a_base_with_all_the_markers_gets_none(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    file = upload_rows(storage, [row(1)])
    first = prepare(job_spec([file], base=base, template="markers"), storage, tmp_path)
    marked = folder_of(first, storage, tmp_path) / "tokenizer"
    spec = job_spec([file], base=marked, template="markers")
    again = prepare(spec, storage, tmp_path / "again")
    markers = again[Stage.preprocessing, Step.close, 0].summary["markers"]
    assert (markers["ids"], markers["added_tokens"]) == (IDS, {})
    assert markers["not_servable_by_vllm"] is None
    folder = folder_of(again, storage, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (marked / name).read_bytes()


def test_the_template_is_part_of_the_key(storage: Storage, base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").unlink()
    file = upload_rows(storage, [row(1)])
    keys = set()
    for template in ("auto", "markers"):
        spec = job_spec([file], base=base, template=template)
        outputs = prepare(spec, storage, tmp_path / template)
        inputs = [out for place, out in outputs.items() if place[0] is Stage.validation]
        plan = {"split": "training", "rows": 0, "index": 0, "first_line": 0}
        keys.add(stage.key(task_of(spec, Stage.preprocessing, Step.shard, plan, inputs)))
    assert len(keys) == 2


def test_texts_beside_markers_hold_none(storage: Storage, base: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} <|user|> is text"}).encode() for n in range(3)]
    spec = job_spec([upload_rows(storage, lines)], base=base, template="markers")
    folder = folder_of(prepare(spec, storage, tmp_path), storage, tmp_path)
    training = read_token_rows(folder / "training.safetensors")
    assert training.ids.max() < SIZE
    chat = ChatBase.load(base)
    number = training.source_line[0] - 1
    wanted = chat.tokenise(Conversation((), text=f"{number} <|user|> is text"), loss_scope="all")
    assert training.row(0)[0].tolist() == wanted.ids.tolist()
