"""The chat templates people use: ids as transformers gives them, masks as worked out by hand."""

from __future__ import annotations

import functools
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.fastpath import FastChat
from llamahome.conversations.proof import unproven
from support.families import FAMILIES, TOOLS, Message, fuzzed, write_family

pytestmark = pytest.mark.model  # transformers is the reference, and loads torch

LONG = [pytest.mark.long, pytest.mark.timeout(900)]
DOSES = [pytest.param(100, id="100"), pytest.param(1000, id="1000", marks=LONG)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_family(folder / name, name)
    return folder


@functools.cache
def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def ours(folder: Path) -> tuple[ChatBase, FastChat]:
    base = ChatBase.load(folder)
    return base, FastChat(base)


def conversation(messages: list[Message]) -> Conversation:
    tools = TOOLS if any(m["role"] == "tool" for m in messages) else []
    return Conversation(tuple(messages), tuple(tools))


def by_hand(folder: Path, name: str, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Ids from transformers; the mask from the hand-made account and transformers' offsets."""
    tokenizer = reference(folder)
    tools = list(conversation(messages).tools) or None
    spelled = list(FAMILIES[name].spell(messages))
    text = "".join(piece for piece, _ in spelled)
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == text
    ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found["input_ids"] == ids["input_ids"]
    chars = np.repeat([trained for _, trained in spelled], [len(piece) for piece, _ in spelled])
    return ids["input_ids"], [bool(chars[a:b].any()) for a, b in found["offset_mapping"]]


@pytest.mark.parametrize("dose", DOSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_masks_of_a_family_are_right(bases: Path, name: str, dose: int) -> None:
    base, fast = ours(bases / name)
    rng = random.Random(f"{name}{dose}")
    taken = 0
    for _ in range(dose):
        messages = fuzzed(rng, FAMILIES[name])
        ids, trained = by_hand(bases / name, name, messages)
        row = conversation(messages)
        slow = base.tokenise(row, loss_scope="assistant")
        assert slow.ids.tolist() == ids, messages
        assert slow.trained.tolist() == trained, messages
        assert slow.agreed or any("tool_calls" in m for m in messages), messages
        quick = fast.tokenise(row, loss_scope="assistant")
        if quick is not None:
            taken += 1
            assert quick.ids.tolist() == ids, messages
            assert quick.trained.tolist() == trained, messages
            assert quick.stop_is_trained() == slow.stop_is_trained()
    assert taken > dose * (0.05 if FAMILIES[name].tools else 0.3), f"{taken} of {dose}"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "alpaca"])
def test_the_stop_token_of_every_trained_turn_is_trained(bases: Path, name: str) -> None:
    base, _ = ours(bases / name)
    rng = random.Random(name)
    for _ in range(20):
        row = conversation(fuzzed(rng, FAMILIES[name]))
        found = base.tokenise(row, loss_scope="assistant")
        special = [token.id for token in base.tokenizer.added if token.special]
        stops = np.isin(found.ids, special) & found.trained
        assert np.count_nonzero(stops) == len(row.assistant_turns())
        edges = np.flatnonzero(np.diff(np.append(found.trained, False).astype(int)) == -1)
        assert stops[edges].all()


@pytest.mark.parametrize("name", FAMILIES)
def test_no_control_id_ever_comes_from_content(bases: Path, name: str) -> None:
    base, fast = ours(bases / name)
    rng = random.Random(name)
    spellings = sorted(token.text for token in base.tokenizer.added if token.special)
    for _ in range(20):
        messages = fuzzed(rng, FAMILIES[name])
        plain = base.tokenise(conversation(messages), loss_scope="assistant")
        for message in messages:
            message["content"] += rng.choice(spellings) + "."
        row = conversation(messages)
        assert fast.tokenise(row, loss_scope="assistant") is None
        found = base.tokenise(row, loss_scope="assistant")
        assert np.count_nonzero(found.control) == np.count_nonzero(plain.control)
        composes = FAMILIES[name].split == "qwen"
        text = unicodedata.normalize("NFC", found.text) if composes else found.text
        assert reference(bases / name).decode(found.ids) == text


@pytest.mark.parametrize("scope", ["assistant", "last", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_proven_fast_path(bases: Path, name: str, scope: str) -> None:
    base, fast = ours(bases / name)
    assert unproven(base, fast, loss_scope=scope) is None
