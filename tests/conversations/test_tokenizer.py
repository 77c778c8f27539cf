"""A base's tokenizer files: what is read, what beats what, and how broken ones are reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations.base_files import tokenizer_files
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.masks import Dropped
from llamahome.conversations.tokenizer import ChatTokenizer
from llamahome.errors import InvalidConfig, NotFound
from support.bases import write_base

MakeBase = Callable[..., Path]
ROW = Conversation(
    ({"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}),
    ({"type": "function", "function": {"name": "sum"}},),
)


def folder_with(tmp_path: Path, make_base: MakeBase, **files: str) -> Path:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((make_base(None) / "tokenizer.json").read_bytes())
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_the_template_file_beats_the_one_in_the_configuration(
    tmp_path: Path, make_base: MakeBase
) -> None:
    config = json.dumps({"chat_template": "from the configuration", "bos_token": "<s>"})
    folder = folder_with(
        tmp_path, make_base, tokenizer_config__json=config,
        special_tokens_map__json=json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "?"}),
    )  # fmt: skip
    assert ChatBase.load(folder).template_source == "from the configuration"
    (folder / "chat_template.jinja").write_text("from the file")
    base = ChatBase.load(folder)
    assert base.template_source == "from the file"
    assert base.tokenizer.named == {"bos_token": "?", "eos_token": "</s>"}
    assert [*tokenizer_files(folder)] == [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    ]  # fmt: skip


def test_rows_with_tools_use_the_template_made_for_them(
    tmp_path: Path, make_base: MakeBase
) -> None:
    templates = [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"},
    ]  # fmt: skip
    config = json.dumps({"chat_template": templates})
    base = ChatBase.load(folder_with(tmp_path, make_base, tokenizer_config__json=config))
    assert base.tokenise(ROW, loss_scope="all").text == "tools"
    assert base.tokenise(Conversation(ROW.messages), loss_scope="all").text == "plain"


def test_a_base_that_cannot_be_read_says_what_and_how_to_mend_it(
    tmp_path: Path, make_base: MakeBase
) -> None:
    with pytest.raises(NotFound, match="Mount it"):
        ChatBase.load(tmp_path / "none")
    with pytest.raises(InvalidConfig, match=r"no tokenizer.json.*save_pretrained"):
        ChatBase.load(tmp_path)
    folder = folder_with(tmp_path, make_base, tokenizer_config__json="{")
    with pytest.raises(InvalidConfig, match=r"tokenizer_config.json: broken JSON"):
        ChatBase.load(folder)
    named = {"chat_template": [{"name": "rag", "template": "x"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(InvalidConfig, match="rag, but none is called default"):
        ChatBase.load(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "What"}}')
    with pytest.raises(InvalidConfig, match="cannot be read"):
        ChatBase.load(folder)


def test_digests_move_with_what_decides_ids_and_with_nothing_else(
    tmp_path: Path, make_base: MakeBase
) -> None:
    first = ChatBase.load(make_base("chatml"))
    other = ChatBase.load(make_base("llama2"))
    assert first.tokenizer_digest == other.tokenizer_digest
    assert first.template_digest != other.template_digest
    config = json.loads((make_base("chatml") / "tokenizer_config.json").read_text())
    same = folder_with(
        tmp_path, make_base, tokenizer_config__json=json.dumps(config | {"name_or_path": "/x"})
    )
    assert ChatBase.load(same).tokenizer_digest == first.tokenizer_digest
    (same / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<s>"}))
    assert ChatBase.load(same).tokenizer_digest != first.tokenizer_digest


@pytest.mark.model
def test_tokens_that_only_the_configuration_declares_are_added_as_transformers_adds_them(
    tmp_path: Path, make_base: MakeBase
) -> None:
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{{ messages[0].content }}<extra>{{ eos_token }}<more>"
    size = ChatTokenizer.load(make_base(None)).vocab_size
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template,
        "bos_token": "<s>", "eos_token": "<new eos>",
        "added_tokens_decoder": {
            str(size): {"content": "<extra>", "special": True, "lstrip": False, "rstrip": False,
                        "normalized": False, "single_word": False},
            str(size + 1): {"content": "<more>", "special": False, "lstrip": True, "rstrip": False,
                            "normalized": False, "single_word": False},
        },
    }  # fmt: skip
    folder = folder_with(tmp_path, make_base, tokenizer_config__json=json.dumps(config))
    row = Conversation(({"role": "user", "content": "Hi <extra>"},))
    plain = Conversation(({"role": "user", "content": "Hi"},))
    base = ChatBase.load(folder)
    reference: Any = AutoTokenizer.from_pretrained(folder)
    found = base.tokenise(plain, loss_scope="all").ids.tolist()
    wanted = reference.apply_chat_template(list(plain.messages), return_dict=True)
    assert found == wanted["input_ids"]
    assert base.tokenise(row, loss_scope="all").ids.tolist().count(size) == 1


def test_a_row_that_the_template_fails_on_is_dropped_with_its_words(
    tmp_path: Path, make_base: MakeBase
) -> None:
    config = json.dumps({"chat_template": "{{ messages[0].content + 5 }}"})
    base = ChatBase.load(folder_with(tmp_path, make_base, tokenizer_config__json=config))
    with pytest.raises(Dropped, match="the chat template says: TypeError"):
        base.tokenise(ROW, loss_scope="all")


@pytest.mark.parametrize("decoder", [False, True])
def test_the_names_in_special_tokens_map_count_as_they_do_in_transformers(
    tmp_path: Path, decoder: bool
) -> None:
    from transformers import AutoTokenizer

    folder = write_base(tmp_path / "base", "chatml")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"eos_token": "</s>"}
    config.pop("added_tokens_decoder", None)
    if decoder:
        config["added_tokens_decoder"] = {}
    path.write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))

    reference = AutoTokenizer.from_pretrained(folder)
    assert ChatTokenizer.load(folder).named["eos_token"] == reference.eos_token
    assert reference.eos_token == ("</s>" if decoder else "<|im_end|>")
