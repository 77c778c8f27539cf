"""``inspect`` shows what the trainer will see: the same ids and masks, in readable pieces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import parse_training_config
from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase
from llamahome.errors import InvalidData
from llamahome.preprocessing.inspection import InspectedRow, inspect_rows
from support.bases import write_base
from support.data import row


def settings(**config: Any) -> dict[str, Any]:
    return dict(parse_training_config(config, source="test").model_dump(mode="json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "chatml")


def looked_at(tmp_path: Path, base: Path, rows: list[bytes], **options: Any) -> list[InspectedRow]:
    config = options.pop("config", settings())
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(rows))
    return list(inspect_rows(file, base, config=config, **options))


def test_pieces_join_to_the_row_and_tell_what_is_trained(tmp_path: Path, base: Path) -> None:
    said = "  It is 東京 😀 \n"
    [found] = looked_at(tmp_path, base, [row(1, said)])
    told = ChatBase.load(base).tokenise(
        Conversation.from_json(json.loads(row(1, said))), loss_scope="assistant"
    )
    assert (found.file, found.line, found.dropped, found.cut) == ("rows.jsonl", 1, None, 0)
    assert list(found.ids) == told.ids.tolist()
    assert list(found.trained) == told.trained.astype(int).tolist()
    assert len(found.pieces) == len(found.ids)
    assert "".join(text for text, _, _ in found.pieces) == told.text
    assert "".join(text for text, trained, _ in found.pieces if trained) == said + "<|im_end|>"
    assert [text for text, _, control in found.pieces if control] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    assert found.to_json() == {
        "file": "rows.jsonl", "line": 1, "ids": list(found.ids), "trained": list(found.trained),
        "dropped": None,
    }  # fmt: skip


def test_rows_are_chosen_by_line_and_by_number(tmp_path: Path, base: Path) -> None:
    rows = [row(1), b"", row(2), b"{}", row(3), row(4)]
    assert [it.line for it in looked_at(tmp_path, base, rows)] == [1, 3, 4, 5, 6]
    assert [it.line for it in looked_at(tmp_path, base, rows, lines=[3, 5])] == [3, 5]
    assert [it.line for it in looked_at(tmp_path, base, rows, limit=2)] == [1, 3]
    assert looked_at(tmp_path, base, rows, lines=[2]) == []


def test_a_row_that_would_be_dropped_says_why(tmp_path: Path, base: Path) -> None:
    rows = [b"{}", row(2, "so " * 200), row(3)]
    bad, long, fine = looked_at(tmp_path, base, rows, config=settings(
        max_length=64, too_long="drop"))  # fmt: skip
    assert bad.dropped is not None
    assert bad.ids == bad.pieces == ()
    assert (long.dropped or "").startswith("too_long: ")
    assert fine.dropped is None
    _, cut, _ = looked_at(tmp_path, base, rows, config=settings(max_length=64))
    assert (len(cut.ids), len(cut.pieces)) == (64, 64)
    assert cut.cut > 100
    with pytest.raises(InvalidData, match=r"rows.jsonl:2, too_long: \d+ tokens"):
        looked_at(tmp_path, base, rows, config=settings(max_length=64, too_long="error"))


def test_conversations_may_be_given_instead_of_a_file(base: Path) -> None:
    rows = [(7, Conversation.from_json(json.loads(row(7))))]
    [found] = inspect_rows(rows, base, config=settings())
    assert (found.line, found.dropped) == (7, None)


def test_it_loads_neither_torch_nor_transformers_nor_a_fleet() -> None:
    code = (
        "import sys, llamahome.preprocessing.inspection, llamahome.preprocessing.stage; "
        "print([m for m in ('torch', 'transformers', 'celery', 'sqlalchemy', 'requests')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
