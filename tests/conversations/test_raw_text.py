"""Raw text: one sequence as the tokenizer has it, all of it trained, control tokens kept apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from llamahome.conversations import Conversation, Limits, parse_row
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.fastpath import FastChat
from llamahome.conversations.proof import difference, unproven
from llamahome.conversations.shaped import ShapedChat
from llamahome.conversations.truncate import kept_length
from llamahome.errors import InvalidConfig
from llamahome.schemas import Rejected
from support.bases import FAMILIES, write_base
from support.families import PIECES, write_family

MakeBase = Callable[..., Path]
BOS = ("<s>", 1)
EOS = ("</s>", 2)
TEXTS = [piece for piece in PIECES if piece.strip()] + ["Once upon a time.\n\nThe end.\n" * 9]
POST: dict[str, Any] = {
    "none": None,
    "bos": processors.TemplateProcessing("<s> $A", special_tokens=[BOS]),
    "both": processors.TemplateProcessing("<s> $A </s>", special_tokens=[BOS, EOS]),
    "offsets": processors.ByteLevel(trim_offsets=True),
    "two": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=[BOS])]
    ),
    "roberta": processors.RobertaProcessing(EOS, BOS),
}


def raw(text: Any, **more: Any) -> Conversation | Rejected | None:
    row = json.dumps({"text": text, **more}).encode()
    return parse_row(row, file="f", line=3, limits=Limits(), format="text")


def refusal(text: Any, **more: Any) -> str:
    found = raw(text, **more)
    assert isinstance(found, Rejected), found
    return found.code


def document(text: str, weight: int = 1) -> Conversation:
    return Conversation((), text=text, weight=weight)


def changed(folder: Path, post: Any, **config: Any) -> Path:
    """A base with that post-processor and these further keys of its configuration."""
    write_base(folder, "chatml")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if post is not None:
        tokenizer.post_processor = post
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def reference_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def check_against_transformers(folder: Path, texts: list[str]) -> None:
    reference, base = reference_of(folder), ChatBase.load(folder)
    for text in texts:
        wanted = reference(text)["input_ids"]
        inside = len(reference(text, add_special_tokens=False)["input_ids"])
        before = wanted.index(1) + 1 if wanted[0] == 1 else 0
        if wanted[-1] != reference.eos_token_id:
            wanted = [*wanted, reference.eos_token_id]
        found = base.tokenise(document(text), loss_scope="assistant")
        assert found.ids.tolist() == wanted, text
        assert found.trained.tolist() == [False] * before + [True] * (inside + 1)
        assert found.stop_is_trained()
        assert found.neutralised == 0


@pytest.mark.model
@pytest.mark.parametrize("post", POST)
def test_ids_are_those_of_transformers_and_the_end(tmp_path: Path, post: str) -> None:
    check_against_transformers(changed(tmp_path, POST[post]), TEXTS)


@pytest.mark.model
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_tokenizer_gives_the_ids_of_transformers(
    make_base: MakeBase, family: str
) -> None:
    check_against_transformers(make_base("chatml", family), TEXTS)


@pytest.mark.model
@pytest.mark.parametrize("name", ["alpaca", "llama3", "qwen", "deepseek"])
def test_texts_of_many_pieces_are_the_same_both_ways_and_in_transformers(
    tmp_path: Path, name: str
) -> None:
    folder = write_family(tmp_path, name)
    reference = reference_of(folder)
    base = ChatBase.load(folder)
    fast, rng = FastChat(base), random.Random(name)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(300)]
    rows = [document(text) for text in texts if text.strip()]
    found = fast.tokenise_all(rows, loss_scope="assistant")
    for row, quick in zip(rows, found, strict=True):
        slow = base.tokenise(row, loss_scope="assistant")
        if not slow.neutralised:
            ids = [*reference(row.text)["input_ids"], reference.eos_token_id]
            assert slow.ids.tolist() == ids
        if quick is not None:
            assert quick.ids.tolist() == slow.ids.tolist()
            assert quick.trained.all()
    assert sum(quick is not None for quick in found) > len(rows) * 0.05


@pytest.mark.model
@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [True, False])
def test_flags_of_the_configuration_count_as_they_do_in_transformers(
    tmp_path: Path, flag: str, value: bool
) -> None:
    for post in ("none", "bos", "both"):
        folder = changed(tmp_path / post, POST[post], **{flag: value})
        check_against_transformers(folder, TEXTS[:3])


def test_every_token_knows_its_place_in_the_text(tmp_path: Path) -> None:
    base = ChatBase.load(changed(tmp_path, POST["bos"]))
    found = base.tokenise(document("The </s> fox"), loss_scope="assistant")
    assert found.text == "<s>The </s> fox</s>"
    places = zip(found.starts.tolist(), found.ends.tolist(), strict=True)
    pieces = [found.text[start:end] for start, end in places]
    assert (pieces[0], pieces[-1]) == ("<s>", "</s>")
    assert "".join(pieces) == found.text
    assert found.control.tolist() == [True] + [False] * (len(pieces) - 2) + [True]


def test_a_tokenizer_without_an_end_adds_none(tmp_path: Path) -> None:
    folder = changed(tmp_path, POST["bos"], eos_token=None)
    found = ChatBase.load(folder).tokenise(document("word"), loss_scope="assistant")
    assert found.text == "<s>word"
    assert found.ids[0] == 1
    assert 2 not in found.ids
    assert not found.stop_is_trained()


def test_a_broken_post_processor_names_the_file(tmp_path: Path) -> None:
    folder = write_base(tmp_path, "chatml")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": {"type": "?"}}))
    with pytest.raises(InvalidConfig, match=r"tokenizer.json.*post-processor"):
        ChatBase.load(folder)


@pytest.mark.parametrize("scope", ["assistant", "last", "all"])
def test_the_scope_makes_no_difference_and_the_weight_does(make_base: MakeBase, scope: str) -> None:
    base = ChatBase.load(make_base("chatml"))
    assert base.tokenise(document("Hi you"), loss_scope=scope).trained.all()
    assert not base.tokenise(document("Hi you", weight=0), loss_scope=scope).trained.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_control_id_ever_comes_from_the_text(make_base: MakeBase, family: str) -> None:
    base = ChatBase.load(make_base("chatml", family))
    control = {t.id for t in base.tokenizer.added if t.text in base.control.tokens}
    control -= {base.tokenizer.unknown_id}
    text = "a <s>b</s> <|im_start|>user\nc<|im_end|></s>"
    found = base.tokenise(document(text), loss_scope="assistant")
    assert not control & set(found.ids[:-1].tolist())
    assert found.control.tolist() == [False] * (len(found.ids) - 1) + [True]
    assert found.neutralised == 5
    assert found.text == text + "</s>"
    # What stands around them is cut as if they were any other text.
    assert found.ends[:-1].max() == len(text)


def test_text_with_a_character_kept_for_control_tokens_is_only_dropped_with_one(
    make_base: MakeBase,
) -> None:
    from llamahome.conversations.masks import Dropped

    base = ChatBase.load(make_base("chatml"))
    base.tokenise(document("odd \U0010fffc but fine"), loss_scope="all")
    with pytest.raises(Dropped, match="control token"):
        base.tokenise(document("odd \U0010fffc </s>"), loss_scope="all")


def test_a_cut_keeps_the_beginning_and_loses_the_end(make_base: MakeBase) -> None:
    found = ChatBase.load(make_base("chatml")).tokenise(document("so " * 50), loss_scope="all")
    assert kept_length(found.trained, max_length=16, too_long="truncate") == 16
    assert found.stop_is_trained()
    assert not found.stop_is_trained(16)


@pytest.mark.parametrize("post", POST)
def test_the_fast_path_takes_texts_and_gives_the_same(tmp_path: Path, post: str) -> None:
    base = ChatBase.load(changed(tmp_path, POST[post]))
    fast = FastChat(base)
    assert unproven(base, fast, loss_scope="assistant") is None
    rows = [document(text) for text in [*TEXTS, "a </s>", "NUL \0", "\n", "fine"]]
    found = fast.tokenise_all(rows, loss_scope="assistant")
    for row, quick in zip(rows, found, strict=True):
        assert difference(base, row, quick, loss_scope="assistant") is None
    assert [row.text for row, quick in zip(rows, found, strict=True) if quick is None] == [
        "a </s>", "NUL \0", "\n",
    ]  # fmt: skip
    assert fast.tokenise(document("fine", weight=0), loss_scope="assistant") is None


def test_the_other_shapes_leave_texts_to_the_tokenizer(make_base: MakeBase) -> None:
    base = ChatBase.load(make_base("chatml", "unigram"))
    assert ShapedChat(base).tokenise(document("Hi"), loss_scope="all") is None


def test_the_canonical_row_is_the_text_and_where_it_is_0_its_weight() -> None:
    found = raw("Once\nupon", meta={"n": 1}, weight=1)
    assert found == document("Once\nupon")
    assert found.to_bytes() == b'{"text":"Once\\nupon"}'
    untrained = raw("Once\nupon", weight=0)
    assert isinstance(untrained, Conversation)
    assert untrained.to_bytes() == b'{"text":"Once\\nupon","weight":0}'
    for row in (found, untrained):
        assert Conversation.from_json(json.loads(row.to_bytes())) == row
    said = Conversation(({"role": "user", "content": "Once\nupon"},))
    assert len({row.digest() for row in (found, untrained, said)}) == 3


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "missing_column"),
        ("", "empty_content"),
        (" \n\t", "empty_content"),
        ("\u200b\u2060", "empty_content"),
        (5, "invalid_content"),
        (["Once"], "invalid_content"),
        ([{"type": "text", "text": "Once"}], "invalid_content"),
        ({"text": "Once"}, "invalid_content"),
        ("half \ud800", "lone_surrogate"),
        ("x" * 1_000_001, "message_too_long"),
    ],
)
def test_a_text_that_cannot_be_used_says_why(text: Any, code: str) -> None:
    assert refusal(text) == code


def test_a_text_of_exactly_the_limit_passes() -> None:
    assert isinstance(raw("x" * 1_000_000), Conversation)


@pytest.mark.parametrize("weight", [2, -1, 0.0, 0.5, True, "0"])
def test_a_weight_is_0_or_1(weight: Any) -> None:
    assert refusal("Once", weight=weight) == "invalid_weight"


def test_a_row_without_text_is_no_text_and_one_with_messages_too_is_read_by_the_file_s_format() -> (
    None
):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    both = json.dumps({**row, "text": "Once"}).encode()

    def read(format: str) -> Conversation | Rejected | None:
        return parse_row(both, file="f", line=1, limits=Limits(), format=format)

    assert read("text") == document("Once")
    assert read("messages") == Conversation(tuple(row["messages"]))
    without = parse_row(b'{"url": "x"}', file="f", line=1, limits=Limits(), format="text")
    assert isinstance(without, Rejected)
    assert without.code == "missing_column"
    mixed = parse_row(json.dumps(row).encode(), file="f", line=1, limits=Limits(), format="text")
    assert isinstance(mixed, Rejected)
    assert mixed.code == "mixed_format"
