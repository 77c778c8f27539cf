"""docs/data.md names every code that a row can be refused with, and every format and limit."""

from __future__ import annotations

import re
from pathlib import Path

from llamahome import conversations
from llamahome.conversations import FORMATS, Limits
from llamahome.conversations.strict_json import MAX_DEPTH

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FOLDER = Path(str(conversations.__file__)).parent
MODULES = ("rules", "formats", "strict_json", "rows", "arrays", "records", "parquet")


def test_every_code_is_on_the_page_and_no_other() -> None:
    pattern = re.compile(r'(?:Refused|_embedded)\(\s*(?:[\w\[\]"]+, )?f?"([a-z_0-9]+(?:\{\w+\})?)"')
    used = {
        code for name in MODULES for code in pattern.findall((FOLDER / f"{name}.py").read_text())
    }
    assert "no_{role}" in used
    used = used - {"no_{role}"} | {"no_user", "no_assistant"}
    table = PAGE.split("## Why a row is refused")[1].split("\n\nTurns of one role")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {code for cell in first_cells for code in re.findall(r"`([a-z_0-9]+)`", cell)}
    assert named == used


def test_formats_and_limits_on_the_page_are_those_of_the_code() -> None:
    for format in FORMATS:
        assert f"| `{format}` |" in PAGE
    limits = Limits()
    assert f"| messages of a conversation | {limits.max_messages:,} |" in PAGE
    assert f"message | {limits.max_chars_per_message:,} |" in PAGE
    assert f"| bytes of a row | {limits.max_line_bytes // 1024**2} MiB |" in PAGE
    assert f"| nesting of a row's JSON | {MAX_DEPTH} |" in PAGE
