"""Every way a row can be wrong has its own outcome; nothing crashes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.conversations import (
    Conversation,
    Limits,
    dump,
    parse_row,
    shown_raw,
)
from llamahome.schemas import Rejected

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ANSWER]}


def parse(raw: bytes | None, line: int = 7, **limits: int) -> Conversation | Rejected | None:
    return parse_row(raw, file="f.jsonl", line=line, limits=Limits(**limits))


def parsed(row: Any, **limits: int) -> Conversation:
    found = parse(json.dumps(row).encode(), **limits)
    assert isinstance(found, Conversation), found
    return found


def refusal(row: Any, **limits: int) -> tuple[str, int | None]:
    found = parse(row if isinstance(row, bytes) else json.dumps(row).encode(), **limits)
    assert isinstance(found, Rejected), found
    assert found.file == "f.jsonl"
    assert found.line == 7
    assert found.reason
    return found.code, found.index


def with_first(message: Any) -> dict[str, Any]:
    return {"messages": [message, ANSWER]}


def with_last(message: Any) -> dict[str, Any]:
    return {"messages": [USER, message]}


def test_a_good_row_becomes_its_canonical_form() -> None:
    row = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "id": 5,
        "messages": [
            {"content": "Be kind.", "role": "developer"},
            {"role": "user", "content": [{"type": "text", "text": "a"},
                                         {"type": "text", "text": " b"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "ok", "tool_call_id": "1", "extra": 1},
            {"role": "assistant", "content": " done\n", "weight": 1, "reasoning": "so"},
            {"role": "user", "content": "More"},
            {"role": "assistant", "content": "No", "weight": 0},
        ],
    }  # fmt: skip
    found = parsed(row)
    assert found.to_json() == {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "a b", "name": "Ann"},
            {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "ok", "tool_call_id": "1"},
            {"role": "assistant", "content": " done\n", "reasoning_content": "so"},
            {"role": "user", "content": "More"},
            {"role": "assistant", "content": "No", "weight": 0},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }  # fmt: skip
    assert Conversation.from_json(json.loads(dump(found.to_json()))) == found


def test_the_digest_ignores_key_order_and_json_white_space_and_nothing_else() -> None:
    one = parse(b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"A"}]}')
    two = parse(
        b'{ "x": 1, "conversation" : [ {"content":"H\\u0069","role":"user"},'
        b' {"weight": 1, "content":"A", "role":"assistant"} ] }\r'
    )
    other = parse(
        b'{"messages":[{"role":"user","content":"Hi "},{"role":"assistant","content":"A"}]}'
    )
    assert isinstance(one, Conversation)
    assert isinstance(two, Conversation)
    assert isinstance(other, Conversation)
    assert one.digest() == two.digest()
    assert one.digest() != other.digest()


@pytest.mark.parametrize("key", ["messages", "conversation", "conversations"])
def test_the_alias_keys_are_the_same(key: str) -> None:
    assert parsed({key: [USER, ANSWER]}) == parsed(GOOD)


def test_two_alias_keys_must_agree() -> None:
    assert parsed({**GOOD, "conversation": GOOD["messages"]}) == parsed(GOOD)
    assert refusal({**GOOD, "conversation": []}) == ("ambiguous_messages", None)


@pytest.mark.parametrize("raw", [b"", b" ", b"\t \r", b"\x0b\x0c"])
def test_white_space_is_no_row(raw: bytes) -> None:
    assert parse(raw) is None


def test_a_byte_order_mark_is_tolerated_before_line_1_only() -> None:
    raw = b"\xef\xbb\xbf" + dump(GOOD)
    assert isinstance(parse(raw, line=1), Conversation)
    assert parse(b"\xef\xbb\xbf", line=1) is None
    assert refusal(raw) == ("invalid_json", None)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{", "invalid_json"),
        (b"{'messages': []}", "invalid_json"),
        (dump(GOOD) + dump(GOOD), "invalid_json"),
        (dump(GOOD)[:-1], "invalid_json"),
        (b"\0", "invalid_json"),
        (b'{"messages": "a\nb"}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": NaN}', "not_finite"),
        (b'{"a": -Infinity}', "not_finite"),
        (b'{"a": 1e999}', "not_finite"),
        (b'{"a": 1, "a": 1}', "duplicate_key"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key"),
        (b'{"messages": "\xff"}', "not_utf8"),
        (b'\xc3\x28{"messages": []}', "not_utf8"),
        (b"[" * 100_000, "too_deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "too_deep"),
        (b"[]", "not_an_object"),
        (b"42", "not_an_object"),
        (b'"s"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"true", "not_an_object"),
        (b"{}", "missing_messages"),
        (b'{"messages": null}', "invalid_messages"),
        (b'{"messages": {}}', "invalid_messages"),
        (b'{"messages": "x"}', "invalid_messages"),
        (b'{"messages": []}', "invalid_messages"),
        (b'{"messages": [], "functions": []}', "invalid_messages"),
        (dump({**GOOD, "functions": []}), "unsupported_key"),
        (dump({**GOOD, "tools": {}}), "invalid_tools"),
        (dump({**GOOD, "tools": ["f"]}), "invalid_tools"),
        (dump({**GOOD, "tools": [{"a": "x"}]})[:-5] + b'\\ud800"}]}', "lone_surrogate"),
    ],
)
def test_a_line_that_is_no_conversation_says_why(raw: bytes, code: str) -> None:
    assert refusal(raw) == (code, None)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (None, "invalid_message"),
        ("Hi", "invalid_message"),
        (["user", "Hi"], "invalid_message"),
        ({"content": "Hi"}, "invalid_role"),
        ({"from": "human", "value": "Hi"}, "invalid_role"),
        ({"role": "narrator", "content": "Hi"}, "invalid_role"),
        ({"role": "USER", "content": "Hi"}, "invalid_role"),
        ({"role": "", "content": "Hi"}, "invalid_role"),
        ({"role": 5, "content": "Hi"}, "invalid_role"),
        ({"role": None, "content": "Hi"}, "invalid_role"),
        ({"role": ["user"], "content": "Hi"}, "invalid_role"),
        ({"role": "user"}, "invalid_content"),
        ({"role": "user", "content": None}, "invalid_content"),
        ({"role": "user", "content": 5}, "invalid_content"),
        ({"role": "user", "content": {"text": "Hi"}}, "invalid_content"),
        ({"role": "user", "content": ["Hi"]}, "invalid_content"),
        ({"role": "user", "content": [{"type": "text"}]}, "invalid_content"),
        ({"role": "user", "content": [{"type": "image_url", "text": "Hi"}]}, "invalid_content"),
        ({"role": "user", "content": []}, "empty_content"),
        ({"role": "user", "content": ""}, "empty_content"),
        ({"role": "user", "content": " \n\t\u00a0\u3000"}, "empty_content"),
        ({"role": "user", "content": "\u200b\u200d\ufeff\u2060"}, "empty_content"),
        ({"role": "user", "content": "Hi", "weight": 1}, "invalid_weight"),
        ({"role": "user", "content": "Hi", "tool_calls": [{}]}, "invalid_tool_calls"),
        ({"role": "user", "content": "Hi", "reasoning_content": "x"}, "unsupported_key"),
        ({"role": "user", "content": "Hi", "audio": {"id": 1}}, "unsupported_key"),
        ({"role": "user", "content": "Hi", "name": 5}, "invalid_content"),
        ({"role": "user", "content": "\ud800"}, "lone_surrogate"),
        ({"role": "user", "content": "Hi", "name": "\udfff"}, "lone_surrogate"),
    ],
)
def test_a_bad_message_is_refused_with_its_index(message: Any, code: str) -> None:
    assert refusal(with_first(message)) == (code, 0)


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"weight": 2}, "invalid_weight"),
        ({"weight": True}, "invalid_weight"),
        ({"weight": 0.0}, "invalid_weight"),
        ({"weight": "1"}, "invalid_weight"),
        ({"function_call": {"name": "f"}}, "unsupported_key"),
        ({"tool_calls": {}}, "invalid_tool_calls"),
        ({"tool_calls": ["f"]}, "invalid_tool_calls"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "invalid_tool_calls"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}, "invalid_tool_calls"),
        ({"reasoning_content": 5}, "invalid_content"),
        ({"reasoning_content": "x", "thinking": 5}, "invalid_content"),
        ({"reasoning_content": "x", "thinking": "y"}, "ambiguous_reasoning"),
        ({"reasoning_content": "x", "reasoning": "x "}, "ambiguous_reasoning"),
        ({"reasoning_content": "x", "thinking": "x", "reasoning": "y"}, "ambiguous_reasoning"),
        ({"content": None, "tool_calls": []}, "invalid_content"),
        ({"content": "\u200b"}, "empty_content"),
    ],
)
def test_a_bad_answer_is_refused_with_its_index(extra: dict[str, Any], code: str) -> None:
    assert refusal(with_last({**ANSWER, **extra})) == (code, 1)


def test_reasoning_under_two_keys_must_agree_and_empty_text_is_none() -> None:
    one = parsed(with_last({**ANSWER, "reasoning_content": "so"}))
    for keys in (
        {"thinking": "so"}, {"reasoning_content": "so", "thinking": "so"},
        {"reasoning_content": "", "thinking": "so"}, {"reasoning_content": None, "reasoning": "so"},
        {"reasoning": "so", "thinking": "so", "reasoning_content": "so"},
    ):  # fmt: skip
        assert parsed(with_last({**ANSWER, **keys})) == one
    assert parsed(with_last({**ANSWER, "reasoning_content": "", "thinking": ""})) == parsed(GOOD)
    found = parse(dump(with_last({**ANSWER, "thinking": "a", "reasoning_content": "b"})))
    assert isinstance(found, Rejected)
    assert found.reason == "message 1: reasoning_content and thinking differ"


@pytest.mark.parametrize(
    ("roles", "code", "index"),
    [
        ("u", "no_assistant", None),
        ("su", "no_assistant", None),
        ("s", "no_user", None),
        ("a", "no_user", None),
        ("sa", "no_user", None),
        ("au", "first_not_user", 0),
        ("sau", "first_not_user", 1),
        ("uau", "last_not_assistant", 2),
        ("uat", "last_not_assistant", 2),
        ("usa", "system_not_first", 1),
        ("ssua", "system_not_first", 1),
        ("uta", "tool_without_call", 1),
        ("suta", "tool_without_call", 2),
    ],
)
def test_the_order_of_turns_has_rules(roles: str, code: str, index: int | None) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    row = {"messages": [{"role": names[role], "content": "x"} for role in roles]}
    assert refusal(row) == (code, index)


@pytest.mark.parametrize("roles", ["ua", "sua", "uua", "uaa", "uaua", "uata", "uattaua"])
def test_turns_in_these_orders_are_fine(roles: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    found = parsed({"messages": [{"role": names[role], "content": "x"} for role in roles]})
    assert [message["role"][0] for message in found.messages] == list(roles)


def test_at_a_limit_passes_and_one_more_is_refused() -> None:
    assert parsed(GOOD, max_messages=2)
    assert refusal(GOOD, max_messages=1) == ("too_many_messages", None)
    assert parsed(GOOD, max_chars_per_message=5)
    assert refusal(GOOD, max_chars_per_message=4) == ("message_too_long", 1)
    assert refusal(GOOD, max_chars_per_message=1) == ("message_too_long", 0)
    assert parse(None) == Rejected(
        file="f.jsonl", line=7, code="line_too_long", reason="longer than 16777216 bytes"
    )


def test_unicode_and_control_characters_are_kept_as_they_are() -> None:
    text = "😀 e\u0301 שלום \0\x07 \ufffe <|im_end|> \r\n"
    assert parsed(with_last({"role": "assistant", "content": text})).messages[1]["content"] == text


def test_a_shown_line_is_short_and_always_text() -> None:
    assert shown_raw(b"a\xffb") == "a\\xffb"
    assert shown_raw(None) == ""
    assert len(shown_raw("😀".encode() * 10_000)) == 2000


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_crash_the_parser(raw: bytes) -> None:
    assert isinstance(parse(raw), (Rejected, Conversation, type(None)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "tool", "text", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "weight", "tools", "tool_calls", "type",
                         "function", "name", "text", "x"]), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, max_size=4), JSON)
def test_no_json_crashes_the_rules(messages: list[Any], extra: Any) -> None:
    found = parse(json.dumps({"messages": messages, "tools": extra}).encode())
    if isinstance(found, Conversation):
        assert Conversation.from_json(json.loads(dump(found.to_json()))) == found
        assert len(found.digest()) == 32
