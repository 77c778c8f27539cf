"""Marker tokens around each turn, added to a base's tokenizer (``template: markers``).

``<|user|>...<|enduser|>`` and ``<|assistant|>...<|endassistant|>``, in turn order, between the
beginning and the end of the sequence where the tokenizer has those. The system's text stands bare
before the first turn. There is no marker for tools: a row with tools, tool calls or a tool turn is
refused by the template.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llamahome.conversations.base_files import DECODER, JsonFile, tokenizer_of
from llamahome.errors import InvalidConfig
from llamahome.schemas import JsonObject

MARKERS = ("<|user|>", "<|enduser|>", "<|assistant|>", "<|endassistant|>")
# An end of the sequence is no part of the turns: only the last answer is followed by one.
MARKERS_TEMPLATE = """\
{%- if tools %}{{- raise_exception("there is no marker for tools") }}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {{- message.content }}
    {%- elif message.role == "user" %}
        {{- "<|user|>" + message.content + "<|enduser|>" }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {{- "<|assistant|>" }}
        {%- generation %}
            {{- message.content + "<|endassistant|>" }}
            {%- if loop.last and not add_generation_prompt %}{{- eos_token }}{%- endif %}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception("there is no marker for tools") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{%- endif %}
"""
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, slots=True)
class MarkerIds:
    """``ids`` of all markers by their text, ``added`` of those that the base did not have;
    ``base_vocabulary`` is one more than the largest id that it had.
    """

    ids: dict[str, int]
    added: dict[str, int]
    base_vocabulary: int


def with_markers(
    document: JsonFile,
    config: JsonFile,
    complete: Callable[[Tokenizer], None],
) -> tuple[JsonFile, JsonFile, MarkerIds]:
    """tokenizer.json and tokenizer_config.json with the markers; a second time changes nothing.

    ``complete`` adds what the base's configuration declares and its tokenizer.json lacks: those
    tokens have ids before the markers. A marker that the base has already keeps its id and is a
    special token from now on. Raises InvalidConfig where no new ids can be given, and where the
    tokenizer cannot be read.
    """
    tokenizer = tokenizer_of(document)
    complete(tokenizer)
    known = tokenizer.get_vocab(with_added_tokens=True)
    size = max(known.values(), default=-1) + 1
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in MARKERS]
    )
    known_now = tokenizer.get_vocab(with_added_tokens=True)
    ids = {text: known_now[text] for text in MARKERS}
    added = {text: id for text, id in ids.items() if text not in known}
    if sorted(added.values()) != list(range(size, size + len(added))):
        raise InvalidConfig(
            f"its tokenizer gives new tokens the ids {sorted(added.values())}, while its largest "
            f"one is {size - 1}", code="invalid_base", file=document.file, field="template",
            remedy="Leave template at auto, which adds no token",
        )  # fmt: skip
    written = json.loads(tokenizer.to_str())
    configured = JsonFile(config.file, _configured(config.content, written))
    return JsonFile(document.file, written), configured, MarkerIds(ids, added, size)


def _configured(config: Mapping[str, Any], document: JsonObject) -> JsonObject:
    """The configuration with the markers' template, and with the markers where it lists tokens."""
    found = {**config, "chat_template": MARKERS_TEMPLATE}
    if DECODER in config:
        others = {
            id: entry for id, entry in config[DECODER].items() if entry["content"] not in MARKERS
        }
        markers = {
            str(token["id"]): {flag: token[flag] for flag in _FLAGS}
            for token in document["added_tokens"] if token["content"] in MARKERS
        }  # fmt: skip
        found[DECODER] = others | markers
    return found
