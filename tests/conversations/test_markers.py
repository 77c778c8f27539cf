"""Marker tokens: added once after the base's own, one id each, the same ids in transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.fastpath import FastChat
from llamahome.conversations.markers import MARKERS, MARKERS_TEMPLATE
from llamahome.conversations.masks import Dropped
from llamahome.conversations.proof import difficult_rows, unproven
from llamahome.conversations.tokenizer import marked_files
from llamahome.errors import InvalidConfig
from support.bases import FAMILIES as KINDS
from support.bases import write_base
from support.families import FAMILIES, Message, fuzzed, write_family

MakeBase = Callable[..., Path]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": " Hello "}


def said(*messages: Message, **more: Any) -> Conversation:
    return Conversation(tuple(messages), **more)


def written(base: Path, folder: Path) -> Path:
    """The tokenizer's files with the markers, as preprocessing writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    document, config, _ = marked_files(base)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def edited(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    body = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(body | changes))


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def by_hand(messages: list[Message], bos: str, eos: str) -> tuple[str, list[bool]]:
    """The text, and of each character whether it is trained."""
    pieces = [(bos, False)]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            pieces.append((content, False))
        elif role == "user":
            pieces.append((f"<|user|>{content}<|enduser|>", False))
        else:
            pieces += [("<|assistant|>", False), (content + "<|endassistant|>", True)]
    pieces.append((eos, True))
    flags = [trained for text, trained in pieces for _ in text]
    return "".join(text for text, _ in pieces), flags


def test_the_form_is_paired_markers_in_turn_order(make_base: MakeBase) -> None:
    """BEHAVIOUR 47: with markers, each turn between its own pair."""
    base = ChatBase.load(make_base("chatml"), markers=True)
    row = said({"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER)
    found = base.tokenise(row, loss_scope="assistant")
    assert found.text == (
        "<s>Be brief.<|user|>Hi<|enduser|><|assistant|> Hello <|endassistant|>"
        "<|user|>Hi<|enduser|><|assistant|> Hello <|endassistant|></s>"
    )
    assert base.tokenizer.markers is not None
    ids = base.tokenizer.markers.ids
    assert [id for id in found.ids.tolist() if id in ids.values()] == 2 * [
        ids[marker] for marker in MARKERS
    ]
    assert (found.ids[0], found.ids[-1]) == (1, 2)
    assert np.count_nonzero(found.ids == 1) == np.count_nonzero(found.ids == 2) == 1
    last = base.tokenise(row, loss_scope="last")
    assert np.count_nonzero(last.trained) < np.count_nonzero(found.trained)
    assert last.trained[-2:].all()


@pytest.mark.parametrize("kind", KINDS)
def test_markers_come_after_all_ids_and_only_once(
    make_base: MakeBase, tmp_path: Path, kind: str
) -> None:
    """BEHAVIOUR 48: single new ids, added once; the other tokens keep theirs."""
    folder = make_base("llama2", kind)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = before.get_vocab_size()
    document, config, markers = marked_files(folder)
    assert markers.base_vocabulary == size
    assert markers.added == markers.ids == dict(zip(MARKERS, range(size, size + 4), strict=True))
    after = Tokenizer.from_str(json.dumps(document))
    assert {text: id for text, id in after.get_vocab().items() if text not in MARKERS} == (
        before.get_vocab()
    )
    assert config["chat_template"] == MARKERS_TEMPLATE
    assert (config["bos_token"], config["unk_token"]) == ("<s>", "<unk>")
    again, config_again, repeated = marked_files(written(folder, tmp_path))
    assert (again, config_again) == (document, config)
    assert repeated.ids == markers.ids
    assert repeated.added == {}


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids_from_the_written_files(
    make_base: MakeBase, tmp_path: Path, kind: str
) -> None:
    """BEHAVIOUR 48: the saved tokenizer gives the same ids."""
    folder = make_base("chatml_generation", kind)
    base = ChatBase.load(folder, markers=True)
    oracle = reference(written(folder, tmp_path))
    same = ChatBase.load(tmp_path)
    assert same.tokenizer_digest == base.tokenizer_digest
    assert same.template_digest == base.template_digest
    rows = [row for row in difficult_rows(["x"]) if not base.control.occurs_in(row)]
    assert len(rows) > 20
    for row in rows:
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in row.messages]
        ids = oracle.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        found = base.tokenise(row, loss_scope="assistant")
        assert found.ids.tolist() == ids
        assert found.agreed or not all(m["content"].strip() for m in messages)


@pytest.mark.model
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_marked_and_keeps_a_proven_fast_path(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path / "base", name)
    base = ChatBase.load(folder, markers=True)
    oracle = reference(written(folder, tmp_path / "written"))
    fast = FastChat(base)
    for scope in ("assistant", "last", "all"):
        assert unproven(base, fast, loss_scope=scope) is None
    rng = random.Random(name)
    family, taken = FAMILIES["alpaca"], 0
    bos, eos = base.tokenizer.named["bos_token"], base.tokenizer.named["eos_token"]
    for _ in range(40):
        messages = fuzzed(rng, family)
        if base.control.occurs_in(said(*messages)):
            continue
        text, flags = by_hand(messages, bos, eos)
        assert oracle.apply_chat_template(messages, tokenize=False) == text
        found = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
        trained = [any(flags[a:b]) for a, b in found["offset_mapping"]]
        rows = [path.tokenise(said(*messages), loss_scope="assistant") for path in (base, fast)]
        taken += rows[1] is not None
        for row in rows:
            if row is not None:
                assert row.ids.tolist() == found["input_ids"]
                assert row.trained.tolist() == trained
    assert taken > 3


@pytest.mark.model
def test_a_prompt_ends_with_the_opening_of_the_answer(make_base: MakeBase, tmp_path: Path) -> None:
    oracle = reference(written(make_base("chatml"), tmp_path))
    prompt = oracle.apply_chat_template(
        [USER, ANSWER, USER], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<s><|user|>Hi<|enduser|><|assistant|> Hello <|endassistant|>"
        "<|user|>Hi<|enduser|><|assistant|>"
    )
    more = oracle.apply_chat_template([USER, ANSWER], tokenize=False, add_generation_prompt=True)
    assert more.endswith("<|endassistant|><|assistant|>")
    whole = oracle.apply_chat_template([USER, ANSWER, USER, ANSWER], tokenize=False)
    assert whole == prompt + " Hello <|endassistant|></s>"


@pytest.mark.model
def test_tokens_that_only_the_configuration_declares_come_before_the_markers(
    tmp_path: Path,
) -> None:
    folder = write_base(tmp_path / "base", "chatml")
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    more = {"content": "<extra>", "special": True, "normalized": False, "lstrip": False,
            "rstrip": False, "single_word": False}  # fmt: skip
    edited(folder, "tokenizer_config.json", added_tokens_decoder={str(size): more},
           pad_token="<pad>")  # fmt: skip
    (folder / "chat_template.jinja").write_text("{{ 'the base has one of its own' }}")
    plain, base = ChatBase.load(folder), ChatBase.load(folder, markers=True)
    markers = base.tokenizer.markers
    assert markers is not None
    assert markers.base_vocabulary == plain.tokenizer.vocab_size == size + 2
    assert markers.added["<|user|>"] == size + 2
    into = written(folder, tmp_path / "written")
    oracle = reference(into)
    assert oracle.convert_tokens_to_ids(["<extra>", "<pad>", *MARKERS]) == [
        size + n for n in range(6)
    ]
    ids = oracle.apply_chat_template([USER, ANSWER], tokenize=True, return_dict=True)["input_ids"]
    assert base.tokenise(said(USER, ANSWER), loss_scope="assistant").ids.tolist() == ids
    declared = json.loads((into / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"] for entry in declared.values()} == {"<extra>", *MARKERS}


def test_a_base_that_has_some_of_the_markers_keeps_their_ids(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "base", "phi3")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<|enduser|>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    document, _, markers = marked_files(folder)
    assert markers.ids["<|user|>"] == tokenizer.token_to_id("<|user|>")
    assert markers.added == {"<|endassistant|>": size}
    specials = {t["content"] for t in document["added_tokens"] if t["special"]}
    assert specials >= set(MARKERS)


def test_markers_in_a_text_are_text(make_base: MakeBase) -> None:
    base = ChatBase.load(make_base("chatml"), markers=True)
    assert base.tokenizer.markers is not None
    ids = list(base.tokenizer.markers.ids.values())
    spelled = "a<|user|>b<|enduser|><|assistant|><|endassistant|>"
    row = said({"role": "user", "content": spelled}, {"role": "assistant", "content": spelled})
    found = base.tokenise(row, loss_scope="assistant")
    assert np.isin(found.ids, ids).sum() == 4
    assert found.neutralised == 8
    raw = base.tokenise(said(text=spelled), loss_scope="assistant")
    assert not np.isin(raw.ids, ids).any()


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([USER, ANSWER], {"tools": ({"type": "function"},)}),
        ([USER, ANSWER, {"role": "tool", "content": "1"}, ANSWER], {}),
        ([USER, {**ANSWER, "tool_calls": [{"function": {"name": "f"}}]}], {}),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], {}),
    ],
)
def test_tools_have_no_marker(
    make_base: MakeBase, messages: list[Message], more: dict[str, Any]
) -> None:
    base = ChatBase.load(make_base("chatml"), markers=True)
    with pytest.raises(Dropped, match="no marker for tools"):
        base.tokenise(said(*messages, **more), loss_scope="assistant")


def test_a_base_without_beginning_and_end_gets_neither(tmp_path: Path) -> None:
    folder = write_base(tmp_path, "chatml")
    edited(folder, "tokenizer_config.json", bos_token=None, eos_token=None)
    base = ChatBase.load(folder, markers=True)
    found = base.tokenise(said(USER, ANSWER), loss_scope="assistant")
    assert found.text == "<|user|>Hi<|enduser|><|assistant|> Hello <|endassistant|>"
    assert found.stop_is_trained()


def test_ids_that_would_not_be_new_are_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path, "chatml")
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 2  # as many tokens as before, and a larger id
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InvalidConfig, match="largest one is"):
        marked_files(folder)
