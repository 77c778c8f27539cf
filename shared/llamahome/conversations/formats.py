"""The formats people have, each turned into the canonical row at the door.

messages (also ``conversation``, ``conversations``), ShareGPT, Alpaca and prompt/completion become
``{"messages": [...], "tools": ...}``, raw text stays as it is; whether that is a usable row is for
``rules`` to say. A file has one format: a row of another one is refused, never mixed in silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamahome.conversations.strict_json import Refused, read_json
from llamahome.schemas import JsonObject

MESSAGES, SHAREGPT, ALPACA = "messages", "sharegpt", "alpaca"
PROMPT_COMPLETION, TEXT = "prompt_completion", "text"
FORMATS = (MESSAGES, SHAREGPT, ALPACA, PROMPT_COMPLETION, TEXT)
MESSAGE_KEYS = ("messages", "conversation", "conversations")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "function_call": "assistant",
    "observation": "tool", "tool": "tool",
}  # fmt: skip


def recognise(row: Any) -> str | None:
    """The format whose columns the row has; None where it has those of none."""
    if not isinstance(row, dict):
        return None
    return next((name for name in FORMATS if _fits(row, name)), None)


def canonical_row(row: Mapping[str, Any], format: str) -> Mapping[str, Any]:
    """A row of a file in ``format`` with ``messages`` and ``tools``, or (raw text) ``text``.

    Raises Refused.
    """
    if not _fits(row, format) and (other := recognise(row)) is not None:
        raise Refused("mixed_format", f"a row in {other} format; the file is in {format} format")
    return _CONVERTERS[format](row)


def _fits(row: Mapping[str, Any], format: str) -> bool:
    if format in (MESSAGES, SHAREGPT):
        return _kind_of_turns(row) == format
    columns = {ALPACA: ("instruction",), PROMPT_COMPLETION: ("prompt", "completion")}
    return all(row.get(column) is not None for column in columns.get(format, (format,)))


def _kind_of_turns(row: Mapping[str, Any]) -> str | None:
    turns = next((row[key] for key in MESSAGE_KEYS if row.get(key) is not None), None)
    if not isinstance(turns, list):
        return None
    found = None
    for turn in turns:
        if isinstance(turn, dict):
            if "role" in turn:
                return MESSAGES
            if "from" in turn:
                found = SHAREGPT
    return found


def _messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**row, "messages": _turns(row)}


def _turns(row: Mapping[str, Any]) -> Any:
    # Tables have every column in every row; the empty ones are null.
    given = [key for key in MESSAGE_KEYS if row.get(key) is not None] or [
        key for key in MESSAGE_KEYS if key in row
    ]
    if not given:
        raise Refused("missing_messages", "has no key messages, conversation or conversations")
    if any(row[key] != row[given[0]] for key in given[1:]):
        raise Refused("ambiguous_messages", f"{' and '.join(given)} differ")
    return row[given[0]]


def _sharegpt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    turns = _turns(row)
    if not isinstance(turns, list) or not turns:
        raise Refused("invalid_messages", "conversations must be a list with at least one turn")
    system = _system(row)  # message 0 where there is one, so that places are those of the messages
    found = [_sharegpt_turn(turn, index) for index, turn in enumerate(turns, len(system))]
    return {"messages": system + found, "tools": _tools(row.get("tools")),
            "functions": row.get("functions")}  # fmt: skip


def _sharegpt_turn(turn: Any, index: int) -> Any:
    if not isinstance(turn, dict):
        raise Refused("invalid_message", f"turn {index} is not an object", index)
    name = turn.get("from")
    role = _SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        reason = f"turn {index}: unknown from {json.dumps(name)[:50]}; known: {known}"
        raise Refused("invalid_role", reason, index)
    if "value" not in turn:
        raise Refused("invalid_content", f"turn {index} has no value", index)
    found: JsonObject = {"role": role}
    if name == "function_call":
        found["tool_calls"] = _tool_calls(turn["value"], index)
    else:
        found["content"] = turn["value"]
    return found | ({"weight": turn["weight"]} if "weight" in turn else {})


def _tool_calls(value: Any, index: int) -> list[JsonObject]:
    """``{"name": ..., "arguments": ...}`` or a list of those, as JSON text or as it is."""
    calls = _embedded(value, "invalid_tool_calls", f"turn {index}: the function call", index)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        reason = f"turn {index}: a function call must be an object with name and arguments"
        raise Refused("invalid_tool_calls", reason, index)
    return [{"type": "function", "function": call} for call in calls]


def _tools(value: Any) -> list[JsonObject] | None:
    """The ``tools`` column: a list, or its JSON text; bare functions are wrapped."""
    if value is None or value in ("", []):
        return None
    tools = _embedded(value, "invalid_tools", "tools", None)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("invalid_tools", "tools must be a list of objects, or its JSON text")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _embedded(value: Any, code: str, what: str, index: int | None) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return read_json(value.encode())
    except UnicodeEncodeError:
        raise Refused("lone_surrogate", "text with half of a surrogate pair", index) from None
    except Refused as refused:
        raise Refused(code, f"{what} is not JSON: {refused.reason}", index) from None


def _alpaca(row: Mapping[str, Any]) -> Mapping[str, Any]:
    asked = [_column(row, "instruction"), _optional(row, "input")]
    messages = _system(row)
    for pair in _history(row):
        messages += _exchange(*pair)
    question = "\n".join(text for text in asked if text)
    return {"messages": messages + _exchange(question, _column(row, "output"))}


def _history(row: Mapping[str, Any]) -> Sequence[Any]:
    history = row.get("history") or []
    pairs = history if isinstance(history, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Refused("invalid_history", "history must be a list of [instruction, output] pairs")
    return pairs


def _exchange(question: Any, answer: Any) -> list[JsonObject]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt_completion(row: Mapping[str, Any]) -> Mapping[str, Any]:
    prompt, completion = _turns_or_text(row, "prompt"), _turns_or_text(row, "completion")
    # Only the completion is trained; answers further up are what led to it.
    asked = [
        {**turn, "weight": 0} if isinstance(turn, dict) and turn.get("role") == "assistant"
        else turn for turn in prompt
    ]  # fmt: skip
    return {"messages": asked + completion, "tools": _tools(row.get("tools")),
            "functions": row.get("functions")}  # fmt: skip


def _turns_or_text(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(value, list):
        return value
    role = "user" if column == "prompt" else "assistant"
    return [{"role": role, "content": _column(row, column)}]


def _text(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"text": _column(row, "text"), "weight": row.get("weight")}


def _system(row: Mapping[str, Any]) -> list[JsonObject]:
    system = _optional(row, "system")
    return [{"role": "system", "content": system}] if system else []


def _optional(row: Mapping[str, Any], column: str) -> str:
    return "" if row.get(column) is None else _column(row, column)


def _column(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise Refused("missing_column", f"has no {column}")
    if not isinstance(value, str):
        raise Refused("invalid_content", f"{column} must be a string")
    return value


_CONVERTERS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    MESSAGES: _messages, SHAREGPT: _sharegpt, ALPACA: _alpaca,
    PROMPT_COMPLETION: _prompt_completion, TEXT: _text,
}  # fmt: skip
