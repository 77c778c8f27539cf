"""Chat-template families people train on, each with an account by hand of what it writes.

``spell(messages)`` gives the text in pieces, (text, trained), without Jinja and without this
project's code: the reference for ids and masks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from support.bases import CHATML, CHATML_GENERATION, CORPUS, LLAMA2, LLAMA3

Message = dict[str, Any]
Spelled = Iterator[tuple[str, bool]]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclasses.dataclass(frozen=True)
class Family:
    """``split``: the tokenizer's pre-tokenizer, gpt2, llama3 or qwen (which also composes)."""

    template: str
    spell: Callable[[Sequence[Message]], Spelled]
    special: tuple[str, ...]
    bos: str = "<s>"
    eos: str = "</s>"
    split: str = "gpt2"
    system: bool = True
    tools: bool = False


def chatml(messages: Sequence[Message]) -> Spelled:
    for m in messages:
        answer = m["role"] == "assistant"
        yield f"<|im_start|>{m['role']}\n", False
        yield m["content"] + "<|im_end|>", answer
        yield "\n", False


def llama2(messages: Sequence[Message]) -> Spelled:
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "user":
            yield f"<s>[INST] {(system + m['content']).strip()} [/INST]", False
            system = ""
        else:
            yield f" {m['content'].strip()} </s>", True


def llama3(messages: Sequence[Message]) -> Spelled:
    yield "<|begin_of_text|>", False
    for m in messages:
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False
        yield m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{{- bos_token }}{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if loop.first and system is defined %}{{- '[INST] ' ~ system ~ '\n\n' ~ m.content ~ "
    "'[/INST]' }}{%- else %}{{- '[INST] ' ~ m.content ~ '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' ~ m.content ~ eos_token }}{%- endif %}{%- endfor %}"
)


def mistral(messages: Sequence[Message]) -> Spelled:
    yield "<s>", False
    for m in messages:
        if m["role"] == "user":
            yield f"[INST] {m['content']} [/INST]", False
        else:
            yield m["content"] + "</s>", True
            yield " ", False


def mistral_system(messages: Sequence[Message]) -> Spelled:
    yield "<s>", False
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = m["content"] + "\n\n"
        elif m["role"] == "user":
            yield f"[INST] {system}{m['content']}[/INST]", False
            system = ""
        else:
            yield f" {m['content']}</s>", True


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def gemma(messages: Sequence[Message]) -> Spelled:
    yield "<bos>", False
    for m in messages:
        answer = m["role"] == "assistant"
        yield f"<start_of_turn>{'model' if answer else 'user'}\n", False
        yield m["content"].strip() + "<end_of_turn>", answer
        yield "\n", False


PHI3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>' + '\n' + m['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}"
    "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
    "{% else %}{{ m['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
)


def phi3(messages: Sequence[Message]) -> Spelled:
    yield "<s>", False
    for m in messages:
        if m["role"] == "assistant":
            yield m["content"] + "<|end|>", True
            yield "\n", False
        else:
            tail = "<|assistant|>\n" if m["role"] == "user" else ""
            yield f"<|{m['role']}|>\n{m['content']}<|end|>\n{tail}", False


ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)


def zephyr(messages: Sequence[Message]) -> Spelled:
    for m in messages:
        answer = m["role"] == "assistant"
        yield f"<|{m['role']}|>\n", False
        yield m["content"] + "</s>", answer
        yield "\n", False


VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] | trim + '\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{{ bos_token + system_message }}{% for message in loop_messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] | trim + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] | trim + eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vicuna(messages: Sequence[Message]) -> Spelled:
    yield "<s>", False
    for m in messages:
        text = m["content"].strip()
        if m["role"] == "system":
            yield text + "\n\n", False
        elif m["role"] == "user":
            yield f"USER: {text}\n", False
        else:
            yield "ASSISTANT:", False
            yield f" {text}</s>", True
            yield "\n", False


DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% set ns = namespace(system_prompt='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system_prompt }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def deepseek(messages: Sequence[Message]) -> Spelled:
    yield "<｜begin▁of▁sentence｜>", False
    yield "".join(m["content"] for m in messages if m["role"] == "system"), False
    for m in messages:
        if m["role"] == "user":
            yield "<｜User｜>" + m["content"], False
        elif m["role"] == "assistant":
            yield "<｜Assistant｜>", False
            yield m["content"].split("</think>")[-1] + "<｜end▁of▁sentence｜>", True


QWEN = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if reasoning %}{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""  # noqa: E501
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"ü": [1, "<b>"]}}}]


def qwen(messages: Sequence[Message]) -> Spelled:
    tools = any(m["role"] == "tool" for m in messages)
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools:
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in TOOLS)
        above = "" if system is None else system + "\n\n"
        yield f"<|im_start|>system\n{above}# Tools\n\n<tools>{listed}\n</tools><|im_end|>\n", False
    elif system is not None:
        yield f"<|im_start|>system\n{system}<|im_end|>\n", False
    for m in messages:
        if m["role"] == "user":
            yield f"<|im_start|>user\n{m['content']}<|im_end|>\n", False
        elif m["role"] == "tool":
            said = f"<tool_response>\n{m['content']}\n</tool_response>"
            yield f"<|im_start|>user\n{said}<|im_end|>\n", False
        elif m["role"] == "assistant":
            yield "<|im_start|>assistant\n", False
            yield _qwen_answer(m) + "<|im_end|>", True
            yield "\n", False


def _qwen_answer(m: Message) -> str:
    content, reasoning = m.get("content") or "", m.get("reasoning_content") or ""
    if not reasoning and "</think>" in content:
        head, tail = content.split("</think>")[0], content.split("</think>")[-1]
        reasoning = head.rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = tail.lstrip("\n")
    if reasoning:
        reasoning = reasoning.strip("\n")
        content = f"<think>\n{reasoning}\n</think>\n\n{content}"
    for call in m.get("tool_calls") or []:
        function = json.dumps(call["function"], ensure_ascii=False)
        content += f"\n<tool_call>\n{function}\n</tool_call>"
    return content


ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def alpaca(messages: Sequence[Message]) -> Spelled:
    for m in messages:
        if m["role"] == "system":
            yield m["content"] + "\n\n", False
        elif m["role"] == "user":
            yield f"### Instruction:\n{m['content']}\n\n", False
        else:
            yield "### Response:\n", False
            yield m["content"] + "\n\n", True


MARKERS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|enduser|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '<|endassistant|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def markers(messages: Sequence[Message]) -> Spelled:
    for m in messages:
        if m["role"] == "user":
            yield f"<|user|>{m['content']}<|enduser|>", False
        else:
            yield "<|assistant|>", False
            yield m["content"] + "<|endassistant|>", True


_CHATML = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, chatml, _CHATML),
    "chatml_generation": Family(CHATML_GENERATION, chatml, _CHATML, split="qwen"),
    "llama2": Family(LLAMA2, llama2, ()),
    "llama3": Family(LLAMA3, llama3, _HEADERS, bos="<|begin_of_text|>", eos="<|eot_id|>",
                     split="llama3"),
    "mistral": Family(MISTRAL, mistral, (), system=False),
    "mistral_system": Family(MISTRAL_SYSTEM, mistral_system, ("[INST]", "[/INST]"),
                             split="llama3"),
    "gemma": Family(GEMMA, gemma, ("<bos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>",
                    system=False),
    "phi3": Family(PHI3, phi3, _ROLE_TOKENS),
    "zephyr": Family(ZEPHYR, zephyr, ()),
    "vicuna": Family(VICUNA, vicuna, ()),
    "deepseek": Family(DEEPSEEK, deepseek, _DEEPSEEK, bos=_DEEPSEEK[0], eos=_DEEPSEEK[1],
                       split="llama3"),
    "qwen": Family(QWEN, qwen, _CHATML, eos="<|im_end|>", split="qwen", tools=True),
    "alpaca": Family(ALPACA, alpaca, ()),
    "markers": Family(MARKERS, markers, ("<|user|>", "<|enduser|>", "<|assistant|>",
                                         "<|endassistant|>"), system=False),
}  # fmt: skip


@functools.cache
def _tokenizer(split: str) -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama3"))
    if split == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    if split == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex({"llama3": LLAMA3_SPLIT, "qwen": QWEN_SPLIT}[split])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return tokenizer.to_str()


def write_family(folder: Path, name: str) -> Path:
    """Fill ``folder`` with a base of that family."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(_tokenizer(family.split))
    tokenizer.add_special_tokens(list(family.special))
    if family.tools:
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos,
        "eos_token": family.eos, "chat_template": family.template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


PIECES = (
    "plain text", "  leading", "trailing  ", "\n\nnewlines\n\n", "\ttabs\t", "a\r\nb\rc", "x", "Z9",
    "emoji 😀 👩\u200d👩\u200d👧 🇩🇪", "東京は日本の首都です。", "你好，世界！",
    "e\u0301\u0323 a\u030a ﬁ",
    "שלום مرحبا", "word " * 9, "\u200bzero\u200dwidth", "\x07 bell", "<", "|>", "im_end|>", "...",
    "[INST] no", "<<SYS>>", "\u2028 sep", "> quote", "12345", "'s 't 're", "\u00a0nbsp", "\u3000",
    "<think>\nhm\n</think>\n\nyes", "a</think>b", " ", "\n", "don't", "The quick brown fox",
)  # fmt: skip


def fuzzed(rng: random.Random, family: Family) -> list[Message]:
    """A conversation that follows the family's rules, of texts that are hard to cut right, without
    text that a tokenizer would take for a control token.
    """
    thinks = [piece for piece in PIECES if "think>" in piece] if family.tools else []

    def text(role: str = "user") -> str:
        barred = [] if role == "assistant" else thinks
        pieces = [p for p in PIECES if p not in barred and not any(t in p for t in family.special)]
        while True:
            made = "".join(rng.choices(pieces, k=rng.randint(1, 4)))
            if made.strip() and made.split("</think>")[-1].strip():
                return made

    messages: list[Message] = []
    if family.system and rng.random() < 0.5:
        messages.append({"role": "system", "content": text()})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if family.tools and rng.random() < 0.3:
            call = {"type": "function", "function": {"name": "sum", "arguments": {"a": text()}}}
            answer = {"role": "assistant", "content": text("assistant"), "tool_calls": [call]}
            messages += [answer, {"role": "tool", "content": text(), "name": "sum"}]
        messages.append({"role": "assistant", "content": text("assistant")})
        if family.tools and rng.random() < 0.3:
            messages[-1]["reasoning_content"] = text()
    return messages
