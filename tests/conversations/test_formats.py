"""Every format becomes the canonical conversation; what does not fit says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamahome.conversations import Conversation, Limits, parse_row
from llamahome.conversations.formats import FORMATS, recognise
from llamahome.schemas import Rejected

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}
CALL = {"name": "f", "arguments": {"x": 1}}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
}


def read(row: Any, format: str) -> Conversation | Rejected | None:
    raw = json.dumps(row).encode()
    return parse_row(raw, file="f", line=3, limits=Limits(), format=format)


def converted(row: Any, format: str) -> dict[str, Any]:
    found = read(row, format)
    assert isinstance(found, Conversation), found
    return found.to_json()


def refusal(row: Any, format: str) -> tuple[str, int | None]:
    found = read(row, format)
    assert isinstance(found, Rejected), found
    assert found.reason
    return found.code, found.index


@pytest.mark.parametrize("format", ROWS)
def test_the_same_exchange_is_one_conversation_in_every_format(format: str) -> None:
    found = read(ROWS[format], format)
    assert isinstance(found, Conversation)
    assert found.to_json() == {"messages": [USER, ANSWER]}
    assert found.digest() == Conversation((USER, ANSWER)).digest()


@pytest.mark.parametrize(
    ("row", "format"),
    [
        *((row, format) for format, row in ROWS.items()),
        ({"text": "Once"}, "text"),
        ({"conversation": [HUMAN, GPT]}, "sharegpt"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"messages": [USER, ANSWER], "prompt": "Hi", "completion": "x", "text": "y"}, "messages"),
        ({"instruction": "Hi", "output": "x", "text": "y", "prompt": None}, "alpaca"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, None),
        ({"messages": []}, None),
        ({"conversations": ["Hi"]}, None),
        ({}, None),
        ([], None),
        ("messages", None),
    ],
)
def test_a_row_s_format_is_told_by_its_columns(row: Any, format: str | None) -> None:
    assert recognise(row) == format


@pytest.mark.parametrize("file", ROWS)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_another_format_is_never_mixed_in(file: str, row: str) -> None:
    found = read(ROWS[row], file)
    if row == file:
        assert isinstance(found, Conversation)
    else:
        assert isinstance(found, Rejected)
        assert found.code == "mixed_format"
        assert found.reason == f"a row in {row} format; the file is in {file} format"


def test_sharegpt_turns_calls_and_columns_are_read() -> None:
    row = {
        "system": "Be kind.",
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
        "conversations": [
            {"from": "user", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "{}"},
            {"from": "model", "value": "Fine", "weight": 0},
            {"from": "human", "value": "More"},
            {"from": "function_call", "value": [CALL, {"name": "g", "arguments": "{}"}]},
            {"from": "tool", "value": "{}"},
            {"from": "assistant", "value": "Done", "extra": 1},
        ],
    }
    assert converted(row, "sharegpt") == {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "{}"},
            {"role": "assistant", "content": "Fine", "weight": 0},
            {"role": "user", "content": "More"},
            {"role": "assistant", "tool_calls": [
                {"type": "function", "function": CALL},
                {"type": "function", "function": {"name": "g", "arguments": "{}"}}]},
            {"role": "tool", "content": "{}"},
            {"role": "assistant", "content": "Done"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }  # fmt: skip


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_an_empty_tools_column_is_none(tools: Any) -> None:
    assert "tools" not in converted({"conversations": [HUMAN, GPT], "tools": tools}, "sharegpt")


def test_tools_that_are_wrapped_already_stay_as_they_are() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"conversations": [HUMAN, GPT], "tools": [tool]}
    assert converted(row, "sharegpt")["tools"] == [tool]


@pytest.mark.parametrize(
    ("row", "code", "index"),
    [
        ({"conversations": []}, "invalid_messages", None),
        ({"conversations": {}}, "invalid_messages", None),
        ({"conversations": None}, "invalid_messages", None),
        ({"conversation": [HUMAN], "conversations": [GPT]}, "ambiguous_messages", None),
        ({}, "missing_messages", None),
        ({"conversations": [HUMAN, "Hi"]}, "invalid_message", 1),
        ({"conversations": [{"value": "Hi"}, GPT]}, "invalid_role", 0),
        ({"conversations": [{"from": "Human", "value": "Hi"}, GPT]}, "invalid_role", 0),
        ({"conversations": [{"from": ["human"], "value": "Hi"}, GPT]}, "invalid_role", 0),
        ({"conversations": [{"from": "human"}, GPT]}, "invalid_content", 0),
        ({"conversations": [{"from": "human", "value": 5}, GPT]}, "invalid_content", 0),
        ({"conversations": [{"from": "human", "value": " "}, GPT]}, "empty_content", 0),
        ({"conversations": [GPT, HUMAN, GPT]}, "first_not_user", 0),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "last_not_assistant", 2),
        ({"conversations": [HUMAN, {**GPT, "weight": 2}]}, "invalid_weight", 1),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{"}]},
         "invalid_tool_calls", 1),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]},
         "invalid_tool_calls", 1),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "5"}]},
         "invalid_tool_calls", 1),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
         "invalid_tool_calls", 1),
        ({"conversations": [HUMAN, {"from": "function_call", "value": '{"a": 1, "a": 2}'}]},
         "invalid_tool_calls", 1),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "\ud800"}]},
         "lone_surrogate", 1),
        ({"conversations": [HUMAN, GPT], "tools": "{"}, "invalid_tools", None),
        ({"conversations": [HUMAN, GPT], "tools": "{}"}, "invalid_tools", None),
        ({"conversations": [HUMAN, GPT], "tools": ["f"]}, "invalid_tools", None),
        ({"conversations": [HUMAN, GPT], "tools": "NaN"}, "invalid_tools", None),
        ({"conversations": [HUMAN, GPT], "functions": [{}]}, "unsupported_key", None),
        ({"conversations": [HUMAN, GPT], "system": 5}, "invalid_content", None),
        ({"conversations": [{"from": "system", "value": "a"}, HUMAN, GPT], "system": "b"},
         "system_not_first", 1),
        # A system column is message 0 in all that is said of the messages.
        ({"conversations": [HUMAN, "Hi"], "system": "b"}, "invalid_message", 2),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 5}], "system": "b"},
         "invalid_content", 2),
    ],
)  # fmt: skip
def test_a_bad_sharegpt_row_says_why(row: Any, code: str, index: int | None) -> None:
    assert refusal(row, "sharegpt") == (code, index)


def test_alpaca_columns_are_read() -> None:
    row = {"instruction": "Sum", "input": "1 2", "output": "3", "system": "Count.",
           "history": [["Hi", "Hello"], ["You?", "Me"]]}  # fmt: skip
    assert converted(row, "alpaca")["messages"] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "You?"}, {"role": "assistant", "content": "Me"},
        {"role": "user", "content": "Sum\n1 2"}, {"role": "assistant", "content": "3"},
    ]  # fmt: skip
    bare = {"instruction": "", "input": "x", "output": "y", "system": None, "history": None}
    assert converted(bare, "alpaca")["messages"][0] == {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"instruction": 5}, "invalid_content"),
        ({"instruction": " "}, "empty_content"),
        ({"input": []}, "invalid_content"),
        ({"output": None}, "missing_column"),
        ({"output": ""}, "empty_content"),
        ({"output": {"a": 1}}, "invalid_content"),
        ({"system": 1}, "invalid_content"),
        ({"history": "Hi"}, "invalid_history"),
        ({"history": ["Hi"]}, "invalid_history"),
        ({"history": [["Hi"]]}, "invalid_history"),
        ({"history": [["Hi", 5]]}, "invalid_content"),
    ],
)
def test_a_bad_alpaca_row_says_why(change: dict[str, Any], code: str) -> None:
    assert refusal({**ROWS["alpaca"], **change}, "alpaca")[0] == code


def test_an_alpaca_row_without_its_columns_names_the_missing_one() -> None:
    found = read({"output": "x"}, "alpaca")
    assert isinstance(found, Rejected)
    assert (found.code, found.reason) == ("missing_column", "has no instruction")


def test_only_the_completion_is_trained() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert converted(row, "prompt_completion")["messages"] == [
        USER, {**ANSWER, "weight": 0}, USER, ANSWER,
    ]  # fmt: skip
    mixed = {"prompt": [USER], "completion": "Hello"}
    assert converted(mixed, "prompt_completion") == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prompt": 5}, "invalid_content"),
        ({"prompt": ""}, "empty_content"),
        ({"prompt": None}, "missing_column"),
        ({"prompt": []}, "no_user"),
        ({"completion": []}, "no_assistant"),
        ({"completion": {}}, "invalid_content"),
        ({"completion": ["Hi"]}, "invalid_message"),
        ({"prompt": ["Hi"]}, "invalid_message"),
    ],
)
def test_a_bad_prompt_or_completion_says_why(change: dict[str, Any], code: str) -> None:
    row = {**ROWS["prompt_completion"], **change}
    assert refusal(row, "prompt_completion")[0] == code


def test_raw_text_stays_as_it_is_and_is_never_mixed_with_turns() -> None:
    assert converted({"text": "Once upon a time"}, "text") == {"text": "Once upon a time"}
    assert refusal({"text": "Once"}, "messages") == ("mixed_format", None)
    assert refusal(ROWS["alpaca"], "text") == ("mixed_format", None)
    assert "text" in FORMATS
