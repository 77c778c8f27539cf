"""What is trained: answers and their end markers, nothing of what others wrote."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations.chat import ChatBase, Tokenised
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.masks import Dropped
from llamahome.conversations.tokenizer import ChatTokenizer

MakeBase = Callable[..., Path]


def talk(*contents: str, weights: tuple[int, ...] = ()) -> Conversation:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]
    for index, weight in enumerate(weights):
        if weight == 0:
            messages[2 * index + 1]["weight"] = 0
    return Conversation(tuple(messages))


def trained_text(row: Tokenised) -> list[str]:
    """The trained stretches of the rendered text."""
    stretches = []
    for on, group in itertools.groupby(range(len(row.ids)), key=lambda i: bool(row.trained[i])):
        places = list(group)
        if on:
            stretches.append(row.text[row.starts[places[0]] : row.ends[places[-1]]])
    return stretches


def with_template(make_base: MakeBase, template: str) -> ChatBase:
    document = json.loads((make_base("chatml") / "tokenizer.json").read_text(encoding="utf-8"))
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    return ChatBase(ChatTokenizer(document, config))


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("chatml", ["One.<|im_end|>", "Two!<|im_end|>"]),
        ("chatml_generation", ["One.<|im_end|>", "Two!<|im_end|>"]),
        ("llama3", ["One.<|eot_id|>", "Two!<|eot_id|>"]),
        ("llama3_generation", ["One.<|eot_id|>", "Two!<|eot_id|>"]),
        ("llama2", [" One. </s>", " Two! </s>"]),
        (None, ["One.</s>", "Two!</s>"]),
    ],
)
def test_answers_and_their_end_markers_are_trained(
    make_base: MakeBase, template: str | None, answers: list[str]
) -> None:
    """BEHAVIOUR 51: which tokens carry loss."""
    base = ChatBase.load(make_base(template))
    row = talk("Ask", "One.", "Again", "Two!")
    found = base.tokenise(row, loss_scope="assistant")
    assert trained_text(found) == answers
    assert found.stop_is_trained()
    last = base.tokenise(row, loss_scope="last")
    assert trained_text(last) == answers[1:]
    every = base.tokenise(row, loss_scope="all")
    assert every.trained.all()
    assert every.stop_is_trained()


@pytest.mark.parametrize("template", ["chatml", "chatml_generation", "llama3_generation", "llama2"])
def test_weight_0_takes_a_turn_out(make_base: MakeBase, template: str) -> None:
    base = ChatBase.load(make_base(template))
    row = talk("Ask", "One.", "Again", "Two!", weights=(0, 1))
    [answer] = trained_text(base.tokenise(row, loss_scope="assistant"))
    assert "Two!" in answer
    every = trained_text(base.tokenise(row, loss_scope="all"))
    assert len(every) == 2
    assert "One." not in "".join(every)
    assert "Ask" in every[0]
    none = talk("Ask", "One.", "Again", "Two!", weights=(0, 0))
    assert not base.tokenise(none, loss_scope="assistant").trained.any()
    skipped = talk("Ask", "One.", "Again", "Two!", weights=(1, 0))
    assert not base.tokenise(skipped, loss_scope="last").trained.any()


def test_a_token_across_the_edge_of_an_answer_belongs_to_it(make_base: MakeBase) -> None:
    """``Ġthe`` covers the space before the answer and the answer's first letters."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA: {% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endif %}{% endfor %}"
    )
    base = with_template(make_base, template)
    found = base.tokenise(talk("x", "the answer🦖"), loss_scope="assistant")
    assert trained_text(found) == [" the answer🦖"]
    emoji = [i for i in range(len(found.ids)) if found.text[found.ends[i] - 1] == "🦖"]
    assert len(emoji) > 1
    assert found.trained[emoji].all()


def test_the_opening_of_the_next_turn_is_not_the_end_of_this_one(make_base: MakeBase) -> None:
    base = ChatBase.load(make_base("llama3_generation"))
    found = base.tokenise(talk("Ask", "One.", "Again", "Two!"), loss_scope="assistant")
    opening = [i for i in range(len(found.ids)) if found.text[found.starts[i] :].startswith("<|st")]
    assert len(opening) == 4
    assert not found.trained[opening].any()


def test_white_space_before_the_end_marker_is_trained_with_it(make_base: MakeBase) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '\n</s>\n' }}{% endif %}{% endfor %}"
    )
    found = with_template(make_base, template).tokenise(
        talk("Ask", "One.", "Again", "Two!"), loss_scope="assistant"
    )
    assert trained_text(found) == ["One.\n</s>", "Two!\n</s>"]


def test_a_template_without_end_markers_trains_the_whole_turn(make_base: MakeBase) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    found = with_template(make_base, template).tokenise(talk("x", "y y"), loss_scope="assistant")
    assert trained_text(found) == [" y y\n"]
    assert not found.stop_is_trained()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: <think>{% endif %}",
            "message 1: its prompt is not how",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "message 1: its prompt is not how",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}"
            "</s>{% endif %}\n{% endfor %}",
            "message 1: the text up to its end is not how",
        ),
        (
            "{% if messages | length < 3 %}{{ raise_exception('short') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "message 1: the template says: short",
        ),
    ],
)
def test_a_template_that_does_not_nest_drops_the_row_and_names_the_way_out(
    make_base: MakeBase, template: str, why: str
) -> None:
    base = with_template(make_base, template)
    row = talk("a", "b", "c", "d")
    with pytest.raises(Dropped, match=why) as caught:
        base.tokenise(row, loss_scope="assistant")
    assert caught.value.code == "template_does_not_nest"
    assert "generation tags" in caught.value.reason
    assert base.tokenise(row, loss_scope="all").trained.all()


def test_a_template_that_refuses_a_row_says_why(make_base: MakeBase) -> None:
    base = ChatBase.load(make_base("llama2"))
    twice = Conversation((*talk("a", "b").messages, {"role": "assistant", "content": "c"}))
    with pytest.raises(Dropped, match="roles must alternate") as caught:
        base.tokenise(twice, loss_scope="assistant")
    assert caught.value.code == "template_refused"


def test_blocks_that_are_not_one_a_turn_are_matched_by_place(make_base: MakeBase) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}{% else %}"
        "{% generation %}{{ m.content[:2] }}{% endgeneration %}|"
        "{% generation %}{{ m.content[2:] }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    base = with_template(make_base, template)
    row = talk("Ask", "One.", "Again", "Two!", weights=(0, 1))
    assert trained_text(base.tokenise(row, loss_scope="assistant")) == ["Tw", "o!</s>"]
    assert len(trained_text(base.tokenise(talk("A", "One.", "B", "Two!"), loss_scope="last"))) == 2


def test_control_text_in_an_answer_leaves_the_mask_where_it_was(make_base: MakeBase) -> None:
    base = ChatBase.load(make_base("chatml_generation"))
    found = base.tokenise(talk("Ask </s>", "One <|im_end|> more"), loss_scope="assistant")
    assert trained_text(found) == ["One <|im_end|> more<|im_end|>"]
    assert found.control[found.trained].sum() == 1
