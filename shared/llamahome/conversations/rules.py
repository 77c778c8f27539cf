"""The rules a conversation keeps. Every refusal names the message and what is wrong with it.

- roles: system (or developer, which is the same) in first place only; user; assistant; tool, after
  an assistant turn. At least one user and one assistant turn; the first turn that is not the
  system's is the user's, the last is the assistant's. Turns of one role in a row are kept as they
  are: whether they may follow each other is for the base's chat template to say.
- content: text, or a list of text parts, which are joined. Something visible must be in it; an
  assistant turn with tool calls may do without.
- ``weight`` 0 or 1, on assistant turns only. 0: read, but not trained.
- reasoning of an assistant turn has three names; under two of them it must be the same.
- keys that would change the meaning and are not read (function_call, audio, ...) are refused; other
  unknown keys are not part of the conversation.
"""

from __future__ import annotations

import dataclasses
import json
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llamahome.conversations.strict_json import Refused
from llamahome.schemas import JsonObject

ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_UNSUPPORTED = ("function_call", "audio", "refusal")
# Format and control characters show nothing on their own.
_INVISIBLE = frozenset({"Cf", "Cc"})
# A text that starts with one of these shows something.
SEEN = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """At the limit passes, one more is refused. Characters are code points."""

    max_messages: int = 1000
    max_chars_per_message: int = 1_000_000
    max_line_bytes: int = 16 * 1024 * 1024


def checked_messages(messages: Any, limits: Limits) -> tuple[JsonObject, ...]:
    """The messages in canonical form. Raises Refused."""
    if not isinstance(messages, list) or not messages:
        raise Refused("invalid_messages", "messages must be a list with at least one message")
    if len(messages) > limits.max_messages:
        raise Refused(
            "too_many_messages", f"{len(messages)} messages, at most {limits.max_messages}"
        )
    found = []
    for index, message in enumerate(messages):
        try:
            found.append(_message(message, limits))
        except Refused as refused:
            reason = f"message {index}: {refused.reason}"
            raise Refused(refused.code, reason, index) from None
    check_structure([message["role"] for message in found])
    return tuple(found)


def checked_tools(row: Mapping[str, Any]) -> tuple[JsonObject, ...]:
    """The row's tools, () where it has none. Raises Refused."""
    if row.get("functions") is not None:
        raise Refused("unsupported_key", "functions is not read; write tools")
    tools = row.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("invalid_tools", "tools must be a list of objects")
    _check_surrogates(tools)
    return tuple(tools)


def checked_text(row: Mapping[str, Any], limits: Limits) -> tuple[str, int]:
    """A raw text and its weight, 0 or 1; the limits and the weight are those of an answer.

    Raises Refused.
    """
    text: str = row["text"]
    _check_shown("text", text, limits)
    _check_surrogates(text)
    return text, _weight(row, "assistant")


def _message(message: Any, limits: Limits) -> JsonObject:
    if not isinstance(message, dict):
        raise Refused("invalid_message", "is not an object")
    role = _role(message)
    if len(message) == 2 and "content" in message:
        found = {"role": role, "content": _content(message, limits, may_be_empty=False)}
    else:
        found = _with_more(message, role, limits)
    _check_surrogates(found)
    return found


def _with_more(message: Mapping[str, Any], role: str, limits: Limits) -> JsonObject:
    """A message that has more than its role and content."""
    for key in _UNSUPPORTED:
        if message.get(key) is not None:
            raise Refused("unsupported_key", f"{key} is not read")
    found: JsonObject = {"role": role}
    calls = _tool_calls(message, role)
    if not (calls and message.get("content") is None):
        found["content"] = _content(message, limits, may_be_empty=bool(calls))
    if _weight(message, role) == 0:
        found["weight"] = 0
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            found[key] = _text(message, key)
    if calls:
        found["tool_calls"] = calls
    if reasoning := _reasoning(message, role, limits):
        found["reasoning_content"] = reasoning
    return found


def _role(message: Mapping[str, Any]) -> str:
    if "role" not in message:
        hint = " (from and value are not read)" if "from" in message else ""
        raise Refused("invalid_role", f"has no role{hint}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(
            "invalid_role", f"unknown role {json.dumps(role)[:50]}; known: {', '.join(ROLES)}"
        )
    return "system" if role == "developer" else role


def _content(message: Mapping[str, Any], limits: Limits, *, may_be_empty: bool) -> str:
    if "content" not in message:
        raise Refused("invalid_content", "has no content")
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise Refused("invalid_content", "content must be text or a list of text parts")
    _check_shown("content", content, limits, may_be_empty=may_be_empty)
    return content


def _check_shown(name: str, text: str, limits: Limits, *, may_be_empty: bool = False) -> None:
    if len(text) > limits.max_chars_per_message:
        raise Refused(
            "message_too_long",
            f"{name} has {len(text)} characters, at most {limits.max_chars_per_message}",
        )
    if not may_be_empty and not is_visible(text):
        raise Refused("empty_content", f"{name} shows nothing")


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise Refused("invalid_content", 'a content part must be {"type": "text", "text": ...}')
    return _text(part, "text")


def _text(owner: Mapping[str, Any], key: str) -> str:
    value = owner.get(key)
    if not isinstance(value, str):
        raise Refused("invalid_content", f"{key} must be text")
    return value


def is_visible(text: str) -> bool:
    """Whether anything of it can be seen."""
    # "" is what an empty text starts with.
    return text[:1] in SEEN or any(
        not char.isspace() and unicodedata.category(char) not in _INVISIBLE for char in text
    )


def _weight(message: Mapping[str, Any], role: str) -> int:
    weight = message.get("weight")
    if weight is None:
        return 1
    if role != "assistant":
        raise Refused("invalid_weight", f"weight on a {role} turn; only assistant turns have one")
    if type(weight) is not int or weight not in (0, 1):
        raise Refused("invalid_weight", f"weight must be 0 or 1, not {json.dumps(weight)[:30]}")
    return weight


def _tool_calls(message: Mapping[str, Any], role: str) -> Sequence[JsonObject]:
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        return []
    if role != "assistant":
        raise Refused("invalid_tool_calls", f"tool_calls on a {role} turn")
    if not isinstance(calls, list):
        raise Refused("invalid_tool_calls", "tool_calls must be a list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused("invalid_tool_calls", "a tool call must have function.name")
        if not isinstance(function.get("arguments", {}), (str, dict)):
            raise Refused("invalid_tool_calls", "function.arguments must be text or an object")
    return calls


def _reasoning(message: Mapping[str, Any], role: str, limits: Limits) -> str | None:
    given = [key for key in _REASONING if message.get(key) is not None]
    if given and role != "assistant":
        raise Refused("unsupported_key", f"{given[0]} on a {role} turn")
    # An empty text is as if it were not there.
    texts = {key: text for key in given if (text := _text(message, key))}
    if len(set(texts.values())) > 1:
        raise Refused("ambiguous_reasoning", f"{' and '.join(texts)} differ")
    if not texts:
        return None
    key, text = next(iter(texts.items()))
    _check_shown(key, text, limits, may_be_empty=True)
    return text


def check_structure(roles: Sequence[str]) -> None:
    """The order of the turns. Raises Refused."""
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        raise Refused("system_not_first", f"message {index}: a system turn must come first", index)
    turns = [role for role in roles if role != "system"]
    shift = len(roles) - len(turns)
    for role in ("user", "assistant"):
        if role not in turns:
            raise Refused(f"no_{role}", f"has no {role} turn")
    if turns[0] != "user":
        raise Refused(
            "first_not_user", f"message {shift}: the first turn is the {turns[0]}'s", shift
        )
    if turns[-1] != "assistant":
        index = len(roles) - 1
        raise Refused(
            "last_not_assistant", f"message {index}: the last turn is the {turns[-1]}'s", index
        )
    if "tool" in turns and "assistant" not in turns[: turns.index("tool")]:
        index = shift + turns.index("tool")
        raise Refused(
            "tool_without_call", f"message {index}: a tool turn before any assistant turn", index
        )


def _check_surrogates(value: Any) -> None:
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        raise Refused("lone_surrogate", "text with half of a surrogate pair") from None
