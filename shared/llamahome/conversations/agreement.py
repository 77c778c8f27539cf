"""The loss mask a second time, from where the messages' own texts stand in what was written.

The first derivation (``masks``) asks the template where an answer begins and ends. This one only
looks where the texts of the messages came out: a trained turn's text must be trained, every other
text must not be; what the template wrote between two texts is trained only in one piece with the
answer before or behind it; and the control token that closes an answer is trained with it. A row
on which the two disagree is not trained on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamahome.conversations.conversation import Conversation
from llamahome.conversations.masks import Dropped, Encoded
from llamahome.conversations.symbolic import FIRST_PRIVATE, Trace, Untraceable, value_of
from llamahome.conversations.templates import FOLLOWED, ChatTemplate, TemplateRefused

_PRIVATE = re.compile(f"[{chr(FIRST_PRIVATE)}-{chr(0x10FFFF)}]")


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Characters [start, end) of a text come from these messages' texts; ``trained``: None where
    they come from trained and untrained messages alike.
    """

    start: int
    end: int
    trained: bool | None


def texts_of(conversation: Conversation) -> dict[tuple[int, str], str]:
    """The texts that are followed through the template, by message and key."""
    return {
        (number, key): message[key]
        for number, message in enumerate(conversation.messages)
        for key in FOLLOWED
        if isinstance(message.get(key), str)
    }


def trained_messages(conversation: Conversation, loss_scope: str) -> frozenset[int]:
    """Whose texts are trained."""
    wanted = conversation.trained_turns(loss_scope)
    if loss_scope != "all":
        return wanted
    removed = frozenset(conversation.assistant_turns()) - wanted
    return frozenset(range(len(conversation.messages))) - removed


def symbolic_places(text: str, trace: Trace, trained: frozenset[int]) -> list[Place] | None:
    """Where the parts stand in a followed text, one character each; None as ``real_places``."""
    found: list[Place] = []
    seen: set[int] = set()
    for match in _PRIVATE.finditer(text):
        if part := trace.part(match[0]):
            seen.update(message for message, _ in part.origins())
            found.append(Place(match.start(), match.end(), _trained(part.origins(), trained)))
    return found if trained <= seen else None


def real_places(
    conversation: Conversation, template: ChatTemplate, text: str, trained: frozenset[int]
) -> list[Place] | None:
    """Where the messages' texts stand in ``text``; None where they cannot be followed there, or a
    trained message has none (an answer of tool calls alone).
    """
    trace = Trace(texts_of(conversation))
    try:
        followed = template.follow(conversation, trace, turns=None, prompt=False).text
    except (Untraceable, TemplateRefused):
        return None
    found: list[Place] = []
    pieces: list[str] = []
    seen: set[int] = set()
    at = last = 0
    for match in _PRIVATE.finditer(followed):
        part = trace.part(match[0])
        if part is None:
            continue
        value, literal = value_of(part, trace.texts), followed[last : match.start()]
        pieces += [literal, value]
        at, last = at + len(literal), match.end()
        found.append(Place(at, at + len(value), _trained(part.origins(), trained)))
        at += len(value)
        if value.strip():
            seen.update(message for message, _ in part.origins())
    known = "".join([*pieces, followed[last:]]) == text and trained <= seen
    return found if known else None


def _trained(origins: Iterator[tuple[int, str]], trained: frozenset[int]) -> bool | None:
    of = {message in trained for message, _ in origins}
    return of.pop() if len(of) == 1 else None


def disagreement(
    places: list[Place], mask: NDArray[np.bool_], encoded: Encoded, *, whole: bool
) -> str | None:
    """How ``mask`` contradicts the places, None where it does not.

    ``whole``: everything may be trained, so what the template wrote is not looked at.
    """
    must = np.zeros(len(encoded.text), dtype=np.bool_)
    must_not = np.zeros(len(encoded.text), dtype=np.bool_)
    for place in places:
        if place.trained is not None:
            (must if place.trained else must_not)[place.start : place.end] = True
    touched = _count(must, encoded) > 0
    inside = _count(must_not, encoded) == encoded.ends - encoded.starts
    inside &= encoded.ends > encoded.starts
    if np.any(touched & ~mask):
        return "a token of an answer is not trained"
    if np.any(inside & ~touched & mask):
        return "a token of a text that is no answer is trained"
    return None if whole else _between(places, mask, encoded)


def _count(flags: NDArray[np.bool_], encoded: Encoded) -> NDArray[np.int64]:
    """How many characters of each token are flagged, int64 [n]."""
    sums = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return np.asarray(sums[encoded.ends] - sums[encoded.starts])


def _between(places: list[Place], mask: NDArray[np.bool_], encoded: Encoded) -> str | None:
    """What is wrong with the tokens that the template wrote between two texts."""
    end = Place(len(encoded.text), len(encoded.text), False)
    for before, after in pairwise([Place(0, 0, False), *places, end]):
        first = int(np.searchsorted(encoded.starts, before.end, side="left"))
        stop = int(np.searchsorted(encoded.ends, after.start, side="right"))
        run = mask[first:stop]
        if not len(run):
            continue
        changes = int(np.count_nonzero(run[1:] != run[:-1]))
        if before.trained is False and run[0] and not (after.trained and changes == 0):
            return "what follows a text that is no answer is trained"
        if after.trained is False and run[-1] and not (before.trained and changes == 0):
            return "what stands before a text that is no answer is trained"
        if changes > 2 or (changes == 2 and not run[0]):
            return "what the template wrote is trained in pieces"
        if before.trained and not run[0] and _closes(first, stop, encoded):
            return "the control token that closes an answer is not trained"
    return None


def _closes(first: int, stop: int, encoded: Encoded) -> bool:
    return first < stop and bool(encoded.control[first])


def agree(
    conversation: Conversation,
    template: ChatTemplate,
    encoded: Encoded,
    mask: NDArray[np.bool_],
    loss_scope: str,
) -> bool:
    """Whether the mask could be derived a second time. Raises Dropped where the two disagree."""
    trained = trained_messages(conversation, loss_scope)
    places = real_places(conversation, template, encoded.text, trained)
    if places is None:
        return False
    if wrong := disagreement(places, mask, encoded, whole=loss_scope == "all"):
        raise Dropped(
            "mask_disagreement",
            f"{wrong}: the chat template's own account of its answers differs from where the "
            "messages' texts stand in the text it writes",
        )
    return True
