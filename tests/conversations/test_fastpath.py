"""The fast path gives what the slow one gives, or nothing; and a wrong one is found out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from llamahome.conversations import Conversation
from llamahome.conversations.bytelevel import ALPHABET, ByteLevelCore, NotByteLevel, grouped
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.fastpath import FastChat
from llamahome.conversations.masks import Dropped
from llamahome.conversations.proof import difference, difficult_rows, sampled, unproven
from llamahome.conversations.shaped import ShapedChat
from llamahome.conversations.tokenizer import ChatTokenizer
from support.bases import CHATML, SPECIAL, byte_level, sentencepiece_bpe, unigram
from support.families import LLAMA3_SPLIT, QWEN_SPLIT

MakeBase = Callable[..., Path]


def talk(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))
    )


def with_template(template: str, tokenizer: Tokenizer | None = None) -> ChatBase:
    document = json.loads((tokenizer or byte_level()).to_str())
    return ChatBase(ChatTokenizer(document, {"chat_template": template, "eos_token": "</s>"}))


def core(**changes: Any) -> ByteLevelCore:
    tokenizer = byte_level()
    document = json.loads(tokenizer.to_str())
    model = changes.pop("model", {})
    document |= changes
    document["model"] |= model
    return ByteLevelCore(document, tokenizer)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=40), split=st.sampled_from(["gpt2", "llama3", "qwen"]))
def test_the_core_gives_the_tokenizers_ids_for_any_text(text: str, split: str) -> None:
    tokenizer = TOKENIZERS[split]
    # White space beside letters and digits is where splits go wrong.
    for varied in (text, f" {text}1 \n", f"a{text}'s  {text}"):
        found = CORES[split].encode(varied)
        ids = CORES[split].ids[found].tolist() if found else []
        assert ids == tokenizer.encode(varied, add_special_tokens=False).ids


@pytest.mark.long
@pytest.mark.parametrize("pattern", [None, LLAMA3_SPLIT, QWEN_SPLIT])
def test_both_regex_engines_split_beside_every_character_alike(pattern: str | None) -> None:
    """Merges of one byte with its neighbour show where one piece ends and the next begins."""
    chars = {byte: char for char, byte in ALPHABET.items()}
    vocab = {char: id for id, char in enumerate(ALPHABET)}
    merges: list[tuple[str, str]] = []
    for plain in b"a1! \n":
        for byte in range(0x80, 0x100):
            merges += [(chars[plain], chars[byte]), (chars[byte], chars[plain])]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = split_tokenizer(pattern).pre_tokenizer
    found = ByteLevelCore(json.loads(tokenizer.to_str()), tokenizer)
    for code in itertools.chain(range(0x80, 0xD800), range(0xE000, 0x20000)):
        c = chr(code)
        text = f"a{c}a 1{c}1 !{c}! {c} \n{c}\n {c}{c}  {c}'s"
        assert found.ids[found.encode(text)].tolist() == tokenizer.encode(text).ids, hex(code)


def split_tokenizer(pattern: str | None) -> Tokenizer:
    tokenizer = byte_level()
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    return tokenizer


TOKENIZERS = {
    "gpt2": split_tokenizer(None),
    "llama3": split_tokenizer(LLAMA3_SPLIT),
    "qwen": split_tokenizer(QWEN_SPLIT),
}
for _tokenizer in TOKENIZERS.values():
    # hypothesis may write a special token's text; the core is for text without.
    assert _tokenizer.token_to_id(SPECIAL[0]) == 0
CORES = {
    name: ByteLevelCore(json.loads(tokenizer.to_str()), tokenizer)
    for name, tokenizer in TOKENIZERS.items()
}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"normalizer": {"type": "NFKC"}}, "its normalizer is NFKC"),
        ({"pre_tokenizer": None}, "missing, not ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
        ({"model": {"type": "WordPiece"}}, "its model is WordPiece"),
        ({"model": {"dropout": 0.1}}, "has dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "has end_of_word_suffix"),
        ({"model": {"merges": [["a", "b"], ["h", "e"], ["a", "b"]]}}, "are not neighbours"),
        ({"model": {"vocab": {"a": 1}}}, "lacks 255 of the 256 bytes"),
    ],
)
def test_a_tokenizer_the_core_cannot_stand_for_says_why(
    changes: dict[str, Any], why: str
) -> None:  # fmt: skip
    with pytest.raises(NotByteLevel, match=why):
        core(**changes)


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
def test_other_families_of_tokenizers_have_no_fast_path(make: Callable[[], Tokenizer]) -> None:
    with pytest.raises(NotByteLevel):
        FastChat(with_template(CHATML, make()))


@pytest.mark.parametrize("template", ["chatml", "chatml_generation", "llama3_generation", "llama2"])
@pytest.mark.parametrize("family", ["sentencepiece_bpe", "unigram"])
def test_other_tokenizers_run_the_same_shapes_with_offsets(
    make_base: MakeBase, family: str, template: str
) -> None:
    base = ChatBase.load(make_base(template, family))
    shaped = ShapedChat(base)
    assert unproven(base, shaped, loss_scope="assistant") is None
    row = talk("Ask", " Say. ", "Again 😀", "\n\nTold ")
    found = shaped.tokenise(row, loss_scope="assistant")
    wanted = base.tokenise(row, loss_scope="assistant")
    assert found is not None
    assert found.ids.tolist() == wanted.ids.tolist()
    assert found.trained.tolist() == wanted.trained.tolist()


def test_shapes_told_apart_by_every_text_do_not_pile_up() -> None:
    template = "{% for m in messages %}{{ m.content | length }}{{ m.content }}</s>{% endfor %}"
    fast = FastChat(with_template(template))
    for length in range(1, 40):
        assert fast.tokenise(talk("a" * length, "b"), loss_scope="all") is not None
    assert [len(known) for known in fast._shapes.values()] == [16]


def test_tokens_that_no_merge_reaches_are_left_out() -> None:
    """``abc`` comes from a|bc, but ab is merged first; tiktoken alone would make ab|c it."""
    vocab = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("ab", "bc", "abc"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c"), ("a", "bc")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = ByteLevelCore(json.loads(tokenizer.to_str()), tokenizer)
    for text in ("abc", "abcabc", "bc", "xabc"):
        assert found.ids[found.encode(text)].tolist() == tokenizer.encode(text).ids
    assert b"abc" not in found.spelled


def test_what_it_cannot_judge_is_left_to_the_slow_path(make_base: MakeBase) -> None:
    fast = FastChat(ChatBase.load(make_base("chatml")))
    assert fast.tokenise(talk("Ask", "Say"), loss_scope="assistant") is not None
    left = [
        talk("Ask </s>", "Say"),
        talk("Ask <|im_", "Say"),
        talk("Ask", " \n "),
        Conversation(talk("Ask", "Say").messages, ({"name": "tool"},)),
        Conversation((*talk("Ask").messages, {"role": "assistant", "tool_calls": []})),
        Conversation(({"role": "user", "content": "x", "name": "n"}, *talk("A", "B").messages)),
    ]
    for row in left:
        assert fast.tokenise(row, loss_scope="assistant") is None


def test_what_a_template_finds_out_about_a_text_decides_for_which_rows_a_shape_holds() -> None:
    template = (
        "{% for m in messages %}{% if 'X' in m.content %}{{ m.content.upper() ~ '|' }}"
        "{% elif m.content | length > 5 %}{{ m.content[:3] + '...' }}{% else %}"
        "{{ m.content | replace('a', 'b') }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    base = with_template(template)
    fast = FastChat(base)
    for texts in (("Xab", "cc"), ("aaaaaaaa", "X y"), ("aa", "banana is long"), ("a", "b")):
        row = talk(*texts)
        found = fast.tokenise(row, loss_scope="assistant")
        assert found is not None
        assert difference(base, row, found, loss_scope="assistant") is None


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages | tojson }}</s>", "the filter tojson"),
        ("{% for m in messages %}{{ m.content | e }}</s>{% endfor %}", "the filter e"),
        ("{% for m in messages %}{{ '%s' | format(m.content) }}{% endfor %}", "filter format"),
        ("{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", "iter"),
        ("{% for m in messages %}{{ m.content in 'abc' }}{{ m.content }}{% endfor %}", "looked"),
        ("{% for m in messages %}{{ 'a'.join([m.content]) }}{% endfor %}", "goes into join"),
        ("\U000f0000{% for m in messages %}{{ m.content }}{% endfor %}", "private characters"),
    ],
)
def test_a_template_that_reads_texts_in_another_way_takes_the_slow_path(
    template: str, why: str
) -> None:
    base = with_template(template)
    assert why in (unproven(base, FastChat(base), loss_scope="all") or "")


@pytest.mark.parametrize("template", ["chatml", "chatml_generation", "llama3_generation", "llama2"])
def test_rows_at_once_are_the_rows_alone(make_base: MakeBase, template: str) -> None:
    base = ChatBase.load(make_base(template))
    fast = FastChat(base)
    rows = [
        *difficult_rows(base.control.tokens),
        talk("A", "B\0"),
        talk("", "x"),
        talk("e\u0301", "y"),
    ]
    together = fast.tokenise_all(rows, loss_scope="assistant")
    assert None in together
    for row, found in zip(rows, together, strict=True):
        alone = fast.tokenise(row, loss_scope="assistant")
        assert (found is None) == (alone is None)
        if found is not None and alone is not None:
            assert found.ids.tolist() == alone.ids.tolist()
            assert found.trained.tolist() == alone.trained.tolist()
            assert difference(base, row, found, loss_scope="assistant") is None


def test_rows_whose_bytes_the_tokens_do_not_cover_are_left_to_the_slow_path() -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[^z]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    base = with_template(CHATML, tokenizer)
    fast = FastChat(base)
    rows = [talk("Ask", "Say"), talk("Lazy", "Say"), talk("Again", "Told")]
    found = fast.tokenise_all(rows, loss_scope="assistant")
    assert [row is None for row in found] == [False, True, False]
    for row, one in zip(rows, found, strict=True):
        assert difference(base, row, one, loss_scope="assistant") is None


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (r"a|[|(]b|(?:c|d)+|\|e|\s+(?!\S)|\s+", r"(?:a|[|(]b|(?:c|d)+|\|e)|\s+(?!\S)|\s+"),
        (r"a|b|c", r"a|b|c"),
        (r"a|b(?=c)|d", r"a|b(?=c)|d"),
        (r"a|\p{L}++|c", r"a|\p{L}++|c"),
        (r"(?i)a|b|c(?!d)", r"(?i)a|b|c(?!d)"),
        (r"[]|]|b|c(?!d)", r"[]|]|b|c(?!d)"),
        (r"(?i:a|b)|[[:alpha:]|]|c(?!d)", r"(?:(?i:a|b)|[[:alpha:]|])|c(?!d)"),
    ],
)
def test_the_plain_alternatives_of_a_pattern_run_as_one(pattern: str, same: str) -> None:
    assert grouped(pattern) == same


def test_a_wrong_fast_path_is_found_out_before_it_is_used(
    make_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ChatBase.load(make_base("chatml"))
    fast = FastChat(base)
    assert unproven(base, fast, loss_scope="assistant") is None
    whole = fast._core.encode_stretches
    monkeypatch.setattr(
        fast._core, "encode_stretches", lambda text: whole(text.replace("\u00a0", "Á"))
    )
    assert unproven(base, fast, loss_scope="assistant") is not None


def test_an_added_token_that_eats_spaces_has_no_fast_path() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<turn>", rstrip=True, special=True)])
    base = with_template("{% for m in messages %}<turn>{{ m.content }}</s>{% endfor %}", tokenizer)
    assert "neighbours' spaces" in (unproven(base, FastChat(base), loss_scope="all") or "")


def test_a_cut_row_knows_whether_its_stop_token_is_still_trained(make_base: MakeBase) -> None:
    base = ChatBase.load(make_base("chatml"))
    fast = FastChat(base)
    row = talk("Ask", "One \u3000\u00a0 ", "Again 😀", "Two\u3000\u3000 ")
    slow, quick = (it.tokenise(row, loss_scope="assistant") for it in (base, fast))
    assert slow is not None
    assert quick is not None
    for length in range(1, len(slow.ids) + 2):
        assert quick.stop_is_trained(length) == slow.stop_is_trained(length), length


def test_the_sample_is_a_matter_of_the_row_alone() -> None:
    digests = [talk(str(n), "a").digest() for n in range(4000)]
    assert 4 <= sum(map(sampled, digests)) <= 40
    assert len(list(difficult_rows(["</s>"]))) > 40


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
            "{% endfor %}",
            "a token of a text that is no answer is trained",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
            "{% generation %}a{% endgeneration %}{{ m.content }}</s>{% endif %}{% endfor %}",
            "a token of an answer is not trained",
        ),
    ],
)
def test_a_row_whose_two_masks_differ_is_dropped(template: str, why: str) -> None:
    base = with_template(template)
    row = talk("Ask this", "Say that", "Ask", "Say")
    with pytest.raises(Dropped, match=why) as caught:
        base.tokenise(row, loss_scope="assistant")
    assert caught.value.code == "mask_disagreement"
    assert FastChat(base).tokenise(row, loss_scope="assistant") is None
