"""A base in memory: read once for as long as its files stay, and what of it goes with the data."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations.chat import ChatBase
from llamahome.conversations.conversation import Conversation
from llamahome.errors import InvalidConfig
from llamahome.local import run_job
from llamahome.preprocessing import stage
from llamahome.preprocessing.base import LoadedBase, load_base
from llamahome.schemas import FileRef, Stage, Step
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage as validation_stage
from support.bases import CHATML, write_base
from support.data import job_spec, row, task_of, upload_rows

STAGES = {
    Stage.validation: (validation_stage.run, validation_stage.key),
    Stage.preprocessing: (stage.run, stage.key),
}
FILE = FileRef(id="f", filename="f", path="u", sha256="0" * 64, bytes=1)
DATED = "{{ strftime_now('%d %b %Y') }} " + CHATML
TOOL_USE = "additional_chat_templates/tool_use.jinja"


def load(folder: Path, day: int = 1, **config: Any) -> LoadedBase:
    spec = job_spec([FILE], base=folder, **config)
    plan = {"today": f"2026-01-{day:02d}"}
    return load_base(task_of(spec, Stage.preprocessing, Step.close, plan))


def key(folder: Path) -> str:
    spec = job_spec([FILE], base=folder)
    return stage.key(task_of(spec, Stage.preprocessing, Step.close, {"today": "2026-01-01"}))


def with_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_base_is_read_once_whatever_the_day(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "b", "chatml")
    first, later = load(folder, 1), load(folder, 2)
    assert first is later
    assert first.fast("assistant")[0] is later.fast("assistant")[0]


def test_a_template_that_asks_for_the_date_gets_it_on_the_same_tokenizer(tmp_path: Path) -> None:
    folder = with_files(write_base(tmp_path / "b", "chatml"), {"chat_template.jinja": DATED})
    row = Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    first, again, later = load(folder, 1), load(folder, 1), load(folder, 2)
    assert first is again
    assert later.chat.tokenizer is first.chat.tokenizer
    texts = [base.chat.tokenise(row, loss_scope="all").text[:11] for base in (first, later)]
    assert texts == ["01 Jan 2026", "02 Jan 2026"]
    cores = {id(base.chat.tokenizer.byte_level()) for base in (first, later)}
    assert len(cores) == 1


def test_no_more_than_two_dates_of_a_base_are_kept(tmp_path: Path) -> None:
    folder = with_files(write_base(tmp_path / "b", "chatml"), {"chat_template.jinja": DATED})
    seen = []
    for day in range(1, 8):
        base = load(folder, day)
        fast, _ = base.fast("assistant")
        assert fast is not None
        seen.append(weakref.ref(fast))
    del base, fast
    gc.collect()
    assert [ref() is None for ref in seen] == [True] * 5 + [False] * 2


def test_nothing_of_a_base_outlives_its_place_in_memory(tmp_path: Path) -> None:
    base = load(write_base(tmp_path / "b", "chatml"))
    fast, _ = base.fast("assistant")
    assert fast is not None
    tokenizer, proven = weakref.ref(base.chat.tokenizer), weakref.ref(fast)
    del base, fast
    for number in range(4):
        load(write_base(tmp_path / str(number), "chatml"))
    gc.collect()
    assert tokenizer() is None
    assert proven() is None


@pytest.mark.parametrize("name", ["config.json", TOOL_USE, "added_tokens.json"])
def test_every_file_that_is_read_counts(tmp_path: Path, name: str) -> None:
    folder = write_base(tmp_path / "b", "chatml")
    with_files(folder, {"chat_template.jinja": CHATML, "config.json": '{"vocab_size": 900}'})
    texts = {
        "config.json": ('{"vocab_size": 100}', '{"vocab_size": 600}'),
        TOOL_USE: ("A" + CHATML, "B" + CHATML),
        "added_tokens.json": ('{"<a>": 800}', '{"<b>": 800}'),
    }[name]
    keys = [key(with_files(folder, {name: text})) for text in texts]
    assert len({*keys, key(write_base(tmp_path / "other", "chatml"))}) == 3


def test_a_changed_number_of_embeddings_is_seen(tmp_path: Path) -> None:
    folder = with_files(write_base(tmp_path / "b", "chatml"), {"config.json": '{"vocab_size": 9}'})
    assert load(folder).vocabulary == 9
    assert load(with_files(folder, {"config.json": '{"vocab_size": 600}'})).vocabulary == 600
    (folder / "config.json").unlink()
    assert load(folder).vocabulary is None


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 7, "text_config": None}, 7),
        ({"text_config": None}, None),
        ({"text_config": {"vocab_size": 8}}, 8),
        ({"vocab_size": None, "text_config": {"vocab_size": 8}}, 8),
        ({"text_config": []}, None),
    ],
)
def test_the_number_of_embeddings_is_the_text_parts_where_there_are_several(
    tmp_path: Path, config: dict[str, Any], size: int | None
) -> None:
    folder = with_files(write_base(tmp_path / "b", "chatml"), {"config.json": json.dumps(config)})
    assert load(folder).vocabulary == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vocab_size": "x"}', "config.json, vocab_size: must be a number of tokens, not 'x'"),
        ('{"vocab_size": 0}', "vocab_size: must be a number of tokens, not 0"),
        ('{"text_config": {"vocab_size": true}}', r"text_config.vocab_size: must be a number"),
        ("[]", "config.json: must be a JSON object"),
        ("{", "config.json: broken JSON"),
    ],
)
def test_a_number_of_embeddings_that_is_none_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    folder = with_files(write_base(tmp_path / "b", "chatml"), {"config.json": text})
    with pytest.raises(InvalidConfig, match=message) as caught:
        load(folder)
    assert caught.value.code == "invalid_base"


@pytest.mark.model
@pytest.mark.parametrize("template", ["auto", "markers"])
def test_the_prepared_tokenizer_is_the_one_that_was_used_with_all_its_files(
    tmp_path: Path, template: str
) -> None:
    from transformers import AutoTokenizer

    storage: Storage = LocalStorage(tmp_path / "storage")
    files = {
        "chat_template.jinja": CHATML, TOOL_USE: "T" + CHATML, "special_tokens_map.json":
        '{"eos_token": "<|im_end|>"}', "added_tokens.json": '{"<a>": 800, "<|user|>": 801}',
    }  # fmt: skip
    folder = with_files(write_base(tmp_path / "b", None), files)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<b>"]
    with_files(folder, {"tokenizer_config.json": json.dumps(config)})
    rows = upload_rows(storage, [row(n, "<a> <b>") for n in range(3)])
    spec = job_spec([rows], base=folder, template=template)
    outputs = run_job(spec, storage, tmp_path / "scratch", stages=STAGES)
    artifact = outputs[Stage.preprocessing, Step.close, 0].artifact
    assert artifact is not None
    copied = storage.fetch(artifact, tmp_path) / "tokenizer"
    used = ChatBase.load(folder, markers=template == "markers")
    wanted: Any = AutoTokenizer.from_pretrained(copied)
    again = ChatBase.load(copied)
    assert again.tokenizer_digest == used.tokenizer_digest
    assert again.template_digest == used.template_digest
    assert wanted.special_tokens_map == used.tokenizer.named
    text = "x<a>y <b> <|user|>z<|im_end|>"
    assert wanted(text, add_special_tokens=False)["input_ids"] == used.tokenizer.encode(text).ids
    names = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    both = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert names == both | (files.keys() if template == "auto" else set())
