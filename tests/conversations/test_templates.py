"""Templates render as transformers renders them, and cannot run away."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations import sample_path
from llamahome.conversations.conversation import Conversation
from llamahome.conversations.templates import (
    FALLBACK_TEMPLATE,
    MAX_TEMPLATE_CHARS,
    ChatTemplate,
    TemplateRefused,
)
from llamahome.errors import InvalidConfig, NotFound

MakeBase = Callable[..., Path]
TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "sum", "description": "Größe <b> & 'q' \"d\"",
                                      "parameters": {"b": 1, "a": [1.5, None, True]}}},
)  # fmt: skip
ROW = Conversation(
    (
        {"role": "system", "content": "Be <kind> & 'good'"},
        {"role": "user", "content": " Add 1 and 2, 東京 😀 "},
        {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": "ü"}}}]},
        {"role": "tool", "content": "3", "name": "sum"},
        {"role": "assistant", "content": "It is\n3.", "reasoning_content": "easy", "weight": 0},
    ),
    TOOLS,
)  # fmt: skip

FEATURES = [
    "{% for m in messages %}\n    {% if m.content %}\n  {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}",
    "{%- for m in messages -%} {{- m.content | default('none') | trim }} {%- endfor -%}",
    "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ tools[0] | tojson(sort_keys=true) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(n=0, self='x') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1, b=2) | tojson }}{{ dict.fromkeys('ab') }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ nothing }}",
    "{% macro say(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}{{ messages[1:] | length }}",
    "{{ messages[-1].reasoning_content }}{{ messages[-1].thinking }}{{ 'weight' in messages[-1] }}",
    "{{ messages[2].content is defined }}{{ messages[2].tool_calls[0].function.arguments.b }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ documents }}{{ add_generation_prompt }}",
    "{{ '%s-%d' | format('a', 3) }}{{ 'a,b'.split(',') }}{{ {'x': 1}.items() | list }}",
    "{{ messages[0].content | replace('<', '[') | upper | e }}{{ '\\n'.join(['a', 'b']) }}",
]  # fmt: skip


def render(source: str, **variables: str) -> str:
    return ChatTemplate(source, variables).render(ROW).text


@pytest.mark.model
@pytest.mark.parametrize("source", FEATURES)
def test_a_template_renders_as_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {key: value for key, value in message.items() if key != "weight"}
        for message in ROW.messages
    ]
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    reference: Any = render_jinja_template
    [wanted], _ = reference(
        conversations=[messages], tools=list(TOOLS), chat_template=source, **variables
    )
    assert render(source, **variables) == wanted


@pytest.mark.model
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('my own words') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 5 }}",
        "{{ range(10000000) }}",
        "{{ nothing.at.all }}",
    ],
)
def test_what_transformers_refuses_is_refused(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    with pytest.raises(Exception, match=".") as wanted:
        render_jinja_template(conversations=[list(ROW.messages)], chat_template=source)
    with pytest.raises(TemplateRefused) as found:
        render(source)
    if "namespace" not in source:
        assert str(wanted.value)[-20:] in str(found.value)


def test_the_date_is_the_one_given_or_today() -> None:
    day = datetime.datetime(2024, 7, 26)
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(source, today=day).render(ROW).text == "26 Jul 2024"
    assert ChatTemplate(source).uses_clock
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(ROW).text >= "2024"


def test_generation_blocks_are_placed_in_the_text() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}{% generation %}{{ loop.index }}-{% endgeneration %}"
        "{% endfor %}"
    )
    found = ChatTemplate(source).render(ROW)
    assert [found.text[a:b] for a, b in found.generations] == ["1-", "2-", "3-", "4-", "5-"]


def test_a_generation_block_that_cannot_be_placed_is_refused_not_guessed() -> None:
    source = (
        "{% macro say(m) %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    with pytest.raises(TemplateRefused, match="macro"):
        render(source)


def test_a_template_is_bounded_in_size_and_in_what_it_writes() -> None:
    with pytest.raises(InvalidConfig, match=f"at most {MAX_TEMPLATE_CHARS}"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))
    loops = "{% for a in range(50000) %}{% for b in range(50000) %}{{ '0123456789' * 1000 }}"
    with pytest.raises(TemplateRefused, match="wrote more than"):
        render(loops + "{% endfor %}{% endfor %}")


def test_a_template_that_is_no_jinja_names_the_line() -> None:
    with pytest.raises(InvalidConfig, match="line 2, chat_template"):
        ChatTemplate("ok\n{% for %}")


def test_the_fallback_shows_every_part_of_a_row() -> None:
    found = ChatTemplate(FALLBACK_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}).render(ROW)
    assert found.text == (
        "<s>Tools:\n" + json.dumps(list(TOOLS), ensure_ascii=False) + "\n\n"
        "Be <kind> & 'good'\n\nUser:\n Add 1 and 2, 東京 😀 \n\n"
        "Assistant:\n" + json.dumps(ROW.messages[2]["tool_calls"], ensure_ascii=False) + "</s>\n\n"
        "Tool:\n3\n\nAssistant:\nIt is\n3.</s>\n\n"
    )  # fmt: skip
    assert [found.text[a:b] for a, b in found.generations][1:] == ["It is\n3.</s>"]
    assert render("") == ""
    assert ChatTemplate(FALLBACK_TEMPLATE).render(ROW).text.startswith("Tools:")


def test_a_bundled_sample_is_found_by_name() -> None:
    assert sample_path("support.jsonl").read_bytes().startswith(b"{")
    with pytest.raises(NotFound, match="Did you mean 'support.jsonl'"):
        sample_path("suport.jsonl")
    with pytest.raises(NotFound):
        sample_path("../rows.py")


@pytest.mark.parametrize(
    "module",
    [
        "llamahome.conversations.chat", "llamahome.conversations.tokens", "llamahome.storage",
        "llamahome.validation.stage", "llamahome.preprocessing.stage",
    ],
)  # fmt: skip
def test_the_data_rooms_load_neither_torch_nor_transformers(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
