"""A base's tokenizer files: templates in files of their own; what is broken is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamahome.conversations.base_files import tokenizer_files
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.conversation import Conversation
from llamahome.errors import InvalidConfig
from support.bases import CHATML

MakeBase = Callable[..., Path]
TURNS = ({"role": "user", "content": "Add 1"}, {"role": "assistant", "content": "2"})
TOOLS = ({"type": "function", "function": {"name": "sum"}},)
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TOOL_USE = "additional_chat_templates/tool_use.jinja"
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def write(folder: Path, base: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.model
@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "D{{ eos_token }}", TOOL_USE: "T{{ bos_token }}"},
        {"chat_template.jinja": "D", "additional_chat_templates/rag.jinja": "R"},
        {"additional_chat_templates/default.jinja": "F", "chat_template.jinja": "D"},
        {"additional_chat_templates/notes.txt": "N", "chat_template.jinja": "D\r\nE"},
        {"tokenizer_config.json": NAMED | {"chat_template": {"default": "D", "tool_use": "T"}}},
        {"tokenizer_config.json": NAMED | {"chat_template": "C"}, "chat_template.jinja": "D"},
    ],
)
def test_templates_are_those_of_transformers_with_tools_and_without(
    files: dict[str, Any], tmp_path: Path, make_base: MakeBase
) -> None:
    from transformers import AutoTokenizer

    files = {"tokenizer_config.json": NAMED} | files
    folder = write(tmp_path / "b", make_base("chatml"), files)
    base, reference = ChatBase.load(folder), AutoTokenizer.from_pretrained(folder)
    for tools in ((), TOOLS):
        wanted: Any = reference.apply_chat_template(
            list(TURNS), tools=list(tools) or None, tokenize=False
        )
        assert base.tokenise(Conversation(TURNS, tools), loss_scope="all").text == wanted


def test_a_folder_of_templates_without_the_default_is_refused(
    tmp_path: Path, make_base: MakeBase
) -> None:
    config = NAMED | {"chat_template": "not in force"}
    files = {"tokenizer_config.json": config, TOOL_USE: "T"}
    folder = write(tmp_path / "b", make_base("chatml"), files)
    with pytest.raises(InvalidConfig, match="tool_use, but none is called default"):
        ChatBase.load(folder)


def test_files_are_named_below_the_folder_in_a_fixed_order(
    tmp_path: Path, make_base: MakeBase
) -> None:
    files = {
        "additional_chat_templates/b.jinja": "", "additional_chat_templates/a.jinja": "",
        "added_tokens.json": {}, "chat_template.jinja": "", "config.json": {},
    }  # fmt: skip
    assert [*tokenizer_files(write(tmp_path / "b", make_base("chatml"), files))] == [
        "tokenizer.json", "added_tokens.json", "chat_template.jinja",
        "additional_chat_templates/a.jinja", "additional_chat_templates/b.jinja",
    ]  # fmt: skip


CONFIG = "tokenizer_config.json"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a listed token without its text": (
        {CONFIG: {"added_tokens_decoder": {"5": {}}}},
        r"tokenizer_config.json, added_tokens_decoder.5.content: is missing",
    ),
    "a listed token that is none": (
        {CONFIG: {"added_tokens_decoder": {"5": "<a>"}}},
        r"tokenizer_config.json, added_tokens_decoder.5: must be an object with content",
    ),
    "a list of tokens that is none": (
        {CONFIG: {"added_tokens_decoder": None}},
        r"tokenizer_config.json, added_tokens_decoder: must be an object of tokens by id, not None",
    ),
    "an id that is none": (
        {CONFIG: {"added_tokens_decoder": {"x": {"content": "<a>"}}}},
        r"added_tokens_decoder: the key 'x' is no id",
    ),
    "a flag that is none": (
        {CONFIG: {"added_tokens_decoder": {"5": {"content": "<a>", "lstrip": "no"}}}},
        r"added_tokens_decoder.5.lstrip: must be true or false, not 'no'",
    ),
    "an entry without template": (
        {CONFIG: {"chat_template": [{"name": "default"}]}},
        r"tokenizer_config.json, chat_template\[0\].template: is missing",
    ),
    "an entry without name": (
        {CONFIG: {"chat_template": [{"template": "x"}]}},
        r"tokenizer_config.json, chat_template\[0\].name: is missing",
    ),
    "a template that is a number": (
        {CONFIG: {"chat_template": 5}},
        r"tokenizer_config.json, chat_template: must be text or a list, not 5",
    ),
    "a template that is no UTF-8": (
        {TOOL_USE: b"\xff"}, r"tool_use.jinja: is not UTF-8: .*Save it as UTF-8"
    ),
    "a template that nests too deeply": (
        {CONFIG: {"chat_template": "{% for a in b %}" * 30 + "{% endfor %}" * 30}},
        r"chat_template: the chat template cannot be read",
    ),
    "half a surrogate pair": (
        {CONFIG: {"chat_template": "\ud800"}}, r"chat_template.default: holds half"
    ),
    "a name that is a number": (
        {CONFIG: {"eos_token": 5}}, r"tokenizer_config.json, eos_token: must be text, not 5"
    ),
    "a name without its kind": (
        {CONFIG: {"eos_token": {"content": "<a>"}}}, r'eos_token: .* must have "__type"'
    ),
    "extra tokens that are no list": (
        {CONFIG: {"extra_special_tokens": "<a>"}},
        r"tokenizer_config.json, extra_special_tokens: must be a list of tokens, not '<a>'",
    ),
    "extra tokens in the map": (
        {"special_tokens_map.json": {"additional_special_tokens": [5]}},
        r"special_tokens_map.json, additional_special_tokens: must be text, not 5",
    ),
    "special without need": (
        {"special_tokens_map.json": {
            "extra_special_tokens": [{"content": "<a>", "special": True}]}},
        r"special_tokens_map.json, extra_special_tokens.special: .*Remove special",
    ),
    "a template in the map": (
        {"special_tokens_map.json": {"chat_template": "x"}},
        r"special_tokens_map.json, chat_template: has no place here. Move it to tokenizer_config",
    ),
    "an added token whose id is none": (
        {"added_tokens.json": {"<a>": "5"}}, r"added_tokens.json, <a>: must be an id, not '5'"
    ),
    "a list in place of an object": (
        {"added_tokens.json": []}, r"added_tokens.json: must be a JSON object"
    ),
    "a token that is two": (
        {CONFIG: {"eos_token": {"__type": "AddedToken", "content": "<a>", "lstrip": True},
                  "bos_token": "<a>"}},
        r"tokenizer_config.json: the token '<a>' has different flags",
    ),
    "tokens that are split": (
        {CONFIG: {"split_special_tokens": True}}, r"split_special_tokens: .*Set it to false"
    ),
    "a tokenizer that is a list": (
        {"tokenizer.json": []}, r"tokenizer.json: must be a JSON object"
    ),
    "a tokenizer that is none": (
        {"tokenizer.json": {"model": {"type": "What"}}},
        r"tokenizer.json: the tokenizer cannot be read",
    ),
    "a tokenizer that nests without end": (
        {"tokenizer.json": "[" * 100_000}, r"tokenizer.json: broken JSON"
    ),
    "ids beyond 32 bits": (
        {"tokenizer.json": {"model": {
            "type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}}},
        r"tokenizer.json, model.vocab: has the id 2147483648, at most 2147483647",
    ),
}  # fmt: skip


# With the markers, ids are refused for another reason, and the base's templates are not compiled.
ONLY_WITHOUT_MARKERS = {"a template that nests too deeply", "ids beyond 32 bits"}


@pytest.mark.parametrize(
    ("case", "markers"),
    [(case, False) for case in BROKEN]
    + [(case, True) for case in BROKEN if case not in ONLY_WITHOUT_MARKERS],
)
def test_what_is_broken_is_named_with_its_file_and_key(
    case: str, markers: bool, tmp_path: Path, make_base: MakeBase
) -> None:
    files, message = BROKEN[case]
    folder = write(tmp_path / "b", make_base("chatml"), files)
    with pytest.raises(InvalidConfig, match=message) as caught:
        ChatBase.load(folder, markers=markers)
    assert caught.value.code == "invalid_base"


@pytest.mark.model
def test_tokens_that_are_split_would_have_other_ids_in_transformers(
    tmp_path: Path, make_base: MakeBase
) -> None:
    from transformers import AutoTokenizer

    config = NAMED | {"split_special_tokens": True, "chat_template": CHATML}
    folder = write(tmp_path / "b", make_base("chatml"), {CONFIG: config})
    split = AutoTokenizer.from_pretrained(folder)
    write(folder, make_base("chatml"), {CONFIG: config | {"split_special_tokens": False}})
    whole = AutoTokenizer.from_pretrained(folder)
    tokenizers: tuple[Any, ...] = (split, whole)
    wrong, right = (
        one.apply_chat_template(list(TURNS), return_dict=True)["input_ids"] for one in tokenizers
    )
    ours = ChatBase.load(folder).tokenise(Conversation(TURNS), loss_scope="all").ids.tolist()
    assert wrong != right == ours


def refusal(folder: Path, *, markers: bool = False) -> str | None:
    """The code that a base is refused with; None where it loads."""
    try:
        ChatBase.load(folder, markers=markers)
    except InvalidConfig as error:
        return error.code
    return None


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists and objects the first few."""
    yield at
    items: Any = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for _, (key, inner) in zip(range(12), items, strict=False):
        yield from _places(inner, (*at, key))


def _whole(base: Path) -> dict[str, Any]:
    """A base that has everything, the second time without an added_tokens_decoder."""
    entry = {"content": "<a>", "special": True, **FLAGS}
    config = NAMED | {
        "eos_token": {"__type": "AddedToken", **entry}, "image_token": "<s>",
        "added_tokens_decoder": {"600": entry, "1": {**entry, "content": "<s>"}},
        "extra_special_tokens": ["<b>", {"__type": "AddedToken", **entry, "content": "<c>"}],
        "additional_special_tokens": ["<d>"], "split_special_tokens": False,
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "x", "template": ""}],
    }  # fmt: skip
    document = json.loads((base / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    names = {"eos_token": entry, "extra_special_tokens": ["<e>"], "pad_token": "<s>"}
    return {
        CONFIG: config, "special_tokens_map.json": names,
        "added_tokens.json": {"<f>": 700, "<e>": 701}, "tokenizer.json": document,
        "chat_template.jinja": CHATML, TOOL_USE: CHATML,
    }  # fmt: skip


JSON_FILES = (CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(("<s>", "\ud800", "content", "default")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner,
                                                               max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_base_with_anything_anywhere_loads_or_is_refused(
    make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    files = copy.deepcopy(_whole(make_base("chatml")))
    if data.draw(st.booleans()):
        del files[CONFIG]["added_tokens_decoder"]
    name = data.draw(st.sampled_from(JSON_FILES))
    place = data.draw(st.sampled_from([*_places(files[name])]))
    value = data.draw(ANYTHING)
    if place:
        inner = files[name]
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    else:
        files[name] = json.dumps(value).encode()
    if data.draw(st.booleans()):
        del files["chat_template.jinja"], files[TOOL_USE]
    folder = write(tmp_path_factory.mktemp("any") / "b", make_base("chatml"), files)
    for markers in (False, True):
        assert refusal(folder, markers=markers) in (None, "invalid_base")


@settings(max_examples=50, deadline=None)
@given(st.sampled_from((*JSON_FILES, TOOL_USE, "chat_template.jinja")), st.binary(max_size=8),
       st.integers(0, 200))  # fmt: skip
def test_a_base_with_any_bytes_anywhere_loads_or_is_refused(
    make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory, name: str, raw: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "b"
    write(folder, make_base("chatml"), _whole(make_base("chatml")))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:at] + raw + content[at:])
    assert refusal(folder) in (None, "invalid_base")
