"""What tokenizer_config.json and the files beside it declare, held against ``AutoTokenizer``; and
how anything else in these files is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamahome.conversations.chat import ChatBase
from llamahome.conversations.conversation import Conversation
from llamahome.errors import InvalidConfig

MakeBase = Callable[..., Path]
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
ROW = Conversation(
    ({"role": "user", "content": "Add 1"}, {"role": "assistant", "content": "2"}),
    ({"type": "function", "function": {"name": "sum"}},),
)
PLAIN = Conversation(ROW.messages)
# Ones that tokenizer.json has, with and without a flag of their own, and new ones.
TEXTS = ("<s>", "<|im_end|>", "The", "<a>", "<b>", "<c>")
# Such texts stand between others, so that the flags of the tokens show.
SHOWN = "x" + "".join(f" {text} {text}y" for text in TEXTS) + " z"


def write(folder: Path, files: dict[str, Any], base: Path) -> Path:
    """A base with these files instead of its own; None removes one."""
    shutil.copytree(base, folder)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")
    return folder


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def config(**more: Any) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "chat_template": TEMPLATE,
    } | more  # fmt: skip


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **flags}


def same_ids(folder: Path) -> ChatBase:
    """Our base, which is as transformers has it."""
    wanted, base = reference(folder), ChatBase.load(folder)
    assert base.tokenizer.named == wanted.special_tokens_map
    for text in (SHOWN, SHOWN.replace(" ", "")):
        assert (
            base.tokenizer.encode(text).ids == wanted(text, add_special_tokens=False)["input_ids"]
        )
    assert base.tokenizer.vocab_size == len(wanted)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    ours = base.tokenizer._tokenizer.get_added_tokens_decoder()
    assert {
        id: [one.content, *(getattr(one, flag) for flag in flags)] for id, one in ours.items()
    } == {
        id: [one.content, *(getattr(one, flag) for flag in flags)]
        for id, one in wanted.added_tokens_decoder.items()
    }
    return base


CASES: dict[str, dict[str, Any]] = {
    "extra_special_tokens": {
        "tokenizer_config.json": config(
            extra_special_tokens=["<b>", token("<a>", lstrip=True), "</s>", "The"]
        )
    },
    "additional_special_tokens": {
        "tokenizer_config.json": config(additional_special_tokens=["<b>", "<a>"])
    },
    "extra before additional": {
        "tokenizer_config.json": config(
            additional_special_tokens=["<b>"], extra_special_tokens=["<a>"]
        )
    },
    "named extra": {
        "tokenizer_config.json": config(
            extra_special_tokens={"image_token": "<b>", "start": token("<a>", special=True)},
            additional_special_tokens=["<c>"], chat_template="{{ image_token }}" + TEMPLATE,
        )
    },
    "a name of its own": {
        "tokenizer_config.json": config(
            boi_token=token("<c>"), image_token="<a>", add_bos_token=True, some_token=5,
            chat_template="{{ image_token }}" + TEMPLATE,
        )
    },
    "flags of a named token": {
        "tokenizer_config.json": config(eos_token=token("<a>", lstrip=True, special=False))
    },
    "flags that the decoder changes": {
        "tokenizer_config.json": config(
            added_tokens_decoder={
                "4": {"content": "<|im_end|>", "lstrip": True, "special": False},
                "900": {"content": "<b>", "rstrip": True},
                "70": {"content": "<a>", "special": False}, "1": {"content": "<s>"},
            },
            bos_token="<b>",
        )
    },
    "special_tokens_map.json": {
        "tokenizer_config.json": config(extra_special_tokens=["<a>"]),
        "special_tokens_map.json": {
            "eos_token": {"content": "<c>", "rstrip": True}, "pad_token": "<b>",
            "extra_special_tokens": [{"content": "<d>"}, "<|im_end|>"], "image_token": "<s>",
        },
    },
    "additional in special_tokens_map.json": {
        "special_tokens_map.json": {"additional_special_tokens": ["<b>", "<a>"]}
    },
    "added_tokens.json": {
        "tokenizer_config.json": config(extra_special_tokens=["<c>"], pad_token="<b>"),
        "added_tokens.json": {"<c>": 900, "<b>": 800, "<a>": 850, "<never>": 1},
    },
    "added_tokens.json beside a decoder": {
        "tokenizer_config.json": config(added_tokens_decoder={}),
        "added_tokens.json": {"<c>": 900},
        "special_tokens_map.json": b"not read either",
    },
}  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("case", CASES)
def test_declared_tokens_have_the_ids_and_flags_that_transformers_gives(
    case: str, tmp_path: Path, make_base: MakeBase
) -> None:
    folder = write(tmp_path / "b", CASES[case], make_base("chatml"))
    base, wanted = same_ids(folder), reference(folder)
    found = base.tokenise(PLAIN, loss_scope="all").ids.tolist()
    assert found == wanted.apply_chat_template(list(PLAIN.messages), return_dict=True)["input_ids"]


@pytest.mark.model
def test_the_pad_token_of_the_padding_is_one_of_the_named(
    tmp_path: Path, make_base: MakeBase
) -> None:
    document = json.loads((make_base("chatml") / "tokenizer.json").read_text())
    document["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<a>",
    }  # fmt: skip
    files = {"tokenizer.json": document, "tokenizer_config.json": config()}
    base = same_ids(write(tmp_path / "b", files, make_base("chatml")))
    assert base.tokenizer.named["pad_token"] == "<a>"


def _flags() -> st.SearchStrategy[dict[str, bool]]:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return st.fixed_dictionaries({}, optional={name: st.booleans() for name in names})


def _typed() -> st.SearchStrategy[Any]:
    return st.builds(lambda text, flags: token(text, **flags), st.sampled_from(TEXTS), _flags())


def _some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.lists(values, max_size=3))


def _by_name(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(("image_token", "start", "bos_token"))
    return st.dictionaries(names, values, max_size=2)


def _entries() -> st.SearchStrategy[dict[str, Any]]:
    entry = st.builds(lambda text, flags: {"content": text, **flags}, st.sampled_from(TEXTS),
                      _flags())  # fmt: skip
    return st.dictionaries(st.integers(0, 900).map(str), entry, max_size=3)


TEXT_OR_TOKEN = st.one_of(st.sampled_from(TEXTS), _typed())
NAMES = ("bos_token", "eos_token", "pad_token", "image_token", "boi_token", "eoi_token")
MORE = {
    **{name: st.one_of(TEXT_OR_TOKEN, st.none()) for name in NAMES},
    "extra_special_tokens": st.one_of(_some(TEXT_OR_TOKEN), _by_name(TEXT_OR_TOKEN)),
    "additional_special_tokens": _some(TEXT_OR_TOKEN),
}
CONFIGS = st.fixed_dictionaries({}, optional=MORE | {"added_tokens_decoder": _entries()})
MAPS = st.fixed_dictionaries({}, optional=MORE)
LEGACY = st.dictionaries(st.sampled_from(TEXTS), st.integers(0, 900), max_size=3)


@pytest.mark.model
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS, st.none() | MAPS, st.none() | LEGACY)
def test_whatever_is_declared_ids_are_those_of_transformers_or_the_base_is_refused(
    tmp_path_factory: pytest.TempPathFactory, make_base: MakeBase,
    more: dict[str, Any], names: dict[str, Any] | None, added: dict[str, int] | None,
) -> None:  # fmt: skip
    files: dict[str, Any] = {"tokenizer_config.json": config(**more)}
    files |= {} if names is None else {"special_tokens_map.json": names}
    files |= {} if added is None else {"added_tokens.json": added}
    folder = write(tmp_path_factory.mktemp("any") / "b", files, make_base("chatml"))
    refused = refusal(folder)
    if refused is None:
        same_ids(folder)
    elif "different flags" not in refused.message:  # of which transformers takes one
        assert refused.code == "invalid_base"
        with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
            reference(folder)


def refusal(folder: Path) -> InvalidConfig | None:
    try:
        ChatBase.load(folder)
    except InvalidConfig as error:
        return error
    return None
