"""Rows as people may write them: good, odd and damaged, each made from a number."""

from __future__ import annotations

import json
import random
from typing import Any

NASTY = (
    '"', "\\", '\\"', '\\\\"', "\\u0022", "a", "\n", "é", "😀", "\u200b", " ", "\0", "\x7f", "role",
    '","role":"user', "}", "\u2028",
)  # fmt: skip
ODD_TURNS: tuple[dict[str, Any], ...] = (
    {"weight": 0}, {"weight": 1}, {"weight": 1.0}, {"weight": True}, {"weight": None},
    {"name": 'a"'}, {"content ": "x"}, {"tool_calls": []}, {"role": "tool"}, {"role": "developer"},
    {"role": "User"}, {"role": "system"}, {"content": ""}, {"content": None}, {"content": "\u200b"},
)  # fmt: skip
ODD_ROWS: tuple[dict[str, Any], ...] = (
    {"id": 5}, {"id": '"'}, {"tools": None}, {"tools": [{"a": 1e16}]}, {"conversation": []},
)  # fmt: skip


def written(seed: int) -> bytes:
    """A row as somebody may write it: often good, sometimes odd, sometimes damaged."""
    any = random.Random(seed)
    turns: list[dict[str, Any]] = [
        {
            "role": ("user", "assistant")[place % 2],
            "content": "".join(any.choices(NASTY, k=any.randrange(6))) + "x",
        }
        for place in range(any.choice([2, 2, 2, 4, 4, 1, 3, 6]))
    ]
    row: dict[str, Any] = {"messages": turns}
    if any.random() < 0.3:
        any.choice(turns).update(any.choice(ODD_TURNS))
    if any.random() < 0.2:
        row |= any.choice(ODD_ROWS)
    separators = any.choice([(",", ":"), (", ", ": ")])
    raw = json.dumps(row, ensure_ascii=any.random() < 0.5, separators=separators).encode()
    return damaged(raw, any) if any.random() < 0.5 else raw


def damaged(raw: bytes, any: random.Random) -> bytes:
    """The row with one thing wrong in its bytes."""
    if any.random() < 0.3:
        at = any.randrange(len(raw))
        return raw[:at] + any.randbytes(1) + raw[at + any.randrange(2) :]
    old, new = any.choice(DAMAGE)
    places = [at for at in range(len(raw)) if raw.startswith(old, at)]
    if not places:
        return raw
    at = any.choice(places)
    return raw[:at] + new + raw[at + len(old) :]


DAMAGE = [
    (b'"role"', b'"role":"user","role"'), (b'"content"', b'"content":"y","content"'),
    (b'"messages"', b'"messages":[],"messages"'), (b'"role"', b'"r\\u006fle"'),
    (b'"role"', b'"r\\u006fle":"user","role"'), (b'\\"', b"\\u0022"), (b'"x', b'"\\u0022'),
    (b"{", b'{"a":NaN,'), (b"{", b'{"a":1e999,'), (b"{", b'{"a":' + b"[" * 40 + b"]" * 40 + b","),
    (b"x", b"\\ud800"), (b"x", b"\xff"), (b"x", b"\xed\xa0\x80"), (b"x", b"\t"), (b"}", b"},}"),
    (b"}", b"}}"), (b"{", b"[{"), (b":", b"::"), (b"x", b"x" * 310), (b"{", b'{"a":01,'),
    (b"{", b'{"a":' + b"9" * 5000 + b","), (b"{", b'{"\\ud800":1,'), (b"{", b" \r{"),
    (b"{", b"\xef\xbb\xbf{"), (b"x", b"\\/"), (b"{", b'{"a":{"b":1,"b":1},'), (b"}", b""),
    (b'"', b""), (b'"user"', b'"us\\u0065r"'),
]  # fmt: skip
