from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import resolve_training_config
from llamahome.conversations.formats import FORMATS
from llamahome.ledger import Ledger
from support.bases import write_base

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
RunCommand = Callable[..., Any]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three lines: a good row, a broken one, a good one."""
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\nno JSON\n{json.dumps(GOOD)}\n")
    return file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", "chatml")


def test_validate_tells_what_a_job_would_and_needs_no_fleet(
    llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    ran = llamahome("validate", rows, "--quarantine", tmp_path / "bad.jsonl")
    assert ran.code == 0
    assert "3 rows = 2 valid + 1 invalid" in ran.out
    bad = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (bad["line"], bad["raw"]) == (2, "no JSON")
    found = llamahome("validate", rows, "--json").json
    assert (found["total"], found["valid"], found["duplicates"]) == (3, 2, 1)


def test_rejected_rows_are_not_written_over_what_is_read(llamahome: RunCommand, rows: Path) -> None:
    before = rows.read_bytes()
    ran = llamahome("validate", rows, "--quarantine", rows)
    assert ran.code != 0
    assert "--quarantine" in ran.err
    assert rows.read_bytes() == before


def test_an_interrupted_run_leaves_the_earlier_quarantine(
    llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "bad.jsonl"
    earlier.write_text("earlier\n")
    (tmp_path / "link.jsonl").symlink_to(earlier)
    before = sorted(tmp_path.iterdir())
    ran = llamahome("validate", rows, tmp_path / "none.jsonl", "--quarantine", earlier)
    assert ran.code == 1
    assert earlier.read_text() == "earlier\n"
    assert sorted(tmp_path.iterdir()) == before
    assert llamahome("validate", rows, "--quarantine", tmp_path / "link.jsonl").code == 0
    assert json.loads(earlier.read_text())["raw"] == "no JSON"
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_read_is_not_taken_for_an_unfinished_quarantine(
    llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    partial = rows.rename(tmp_path / "bad.jsonl.partial")
    before = partial.read_bytes()
    ran = llamahome("validate", partial, "--quarantine", tmp_path / "bad.jsonl")
    assert ran.code != 0
    assert "bad.jsonl.partial is one of the files to check" in ran.err
    assert partial.read_bytes() == before


def test_a_pipe_is_written_to_and_no_device_is_replaced(
    llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    assert llamahome("validate", rows, "--quarantine", "/dev/null").code == 0
    assert not Path("/dev/null").is_file()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert llamahome("validate", rows, "--quarantine", pipe).code == 0
        assert json.loads(os.read(reader, 65536))["raw"] == "no JSON"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_validate_fails_where_a_job_would(
    llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    assert llamahome("validate", rows, "--set", "max_invalid_share=0.1").code == 1
    (tmp_path / "empty.jsonl").touch()
    assert llamahome("validate", tmp_path / "empty.jsonl").code == 1
    missing = llamahome("validate", tmp_path / "none.jsonl")
    assert missing.code == 1
    assert "none.jsonl" in missing.err
    assert len(missing.err.splitlines()) == 1


def test_inspect_prints_one_object_a_row(llamahome: RunCommand, rows: Path, base: Path) -> None:
    ran = llamahome("inspect", rows, "--base", base, "--all", "--json")
    assert ran.code == 0
    objects = [json.loads(line) for line in ran.out.splitlines()]
    assert [(o["file"], o["line"]) for o in objects] == [("rows.jsonl", n) for n in (1, 2, 3)]
    assert [bool(o["dropped"]) for o in objects] == [False, True, False]
    for found in objects:
        assert set(found) == {"file", "line", "ids", "trained", "dropped"}
        assert len(found["ids"]) == len(found["trained"])
    assert 0 < sum(objects[0]["trained"]) < len(objects[0]["ids"])


def test_inspect_shows_the_rows_asked_for(llamahome: RunCommand, rows: Path, base: Path) -> None:
    first = llamahome("inspect", rows, "--base", base)
    assert first.out.startswith("rows.jsonl:1  ")
    assert "[hello<|im_end|>]" in first.out.replace("][", "")
    assert "[hi" not in first.out
    assert llamahome("inspect", rows, "--base", base, "--line", "3").out.startswith("rows.jsonl:3")
    assert (
        len(llamahome("inspect", rows, "--base", base, "-n", "2", "--json").out.splitlines()) == 2
    )
    beyond = llamahome("inspect", rows, "--base", base, "--line", "9")
    assert (beyond.code, beyond.out) == (1, "")
    both = llamahome("inspect", rows, "--base", base, "-n", "2", "--all")
    assert both.code == 1


def test_inspect_takes_a_registered_base_by_name(
    llamahome: RunCommand, rows: Path, base: Path, tmp_path: Path
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite3")
    ledger.upgrade()
    ledger.add_base("tiny", str(base), "d" * 64)
    ledger.close()
    by_name = llamahome("inspect", rows, "--base", "tiny", "--state", tmp_path, "--all", "--json")
    by_folder = llamahome("inspect", rows, "--base", base, "--all", "--json")
    assert by_name.out == by_folder.out
    wrong = llamahome("inspect", rows, "--base", "tinny", "--state", tmp_path)
    assert "Did you mean 'tiny'" in wrong.err


def test_the_formats_that_may_be_named_are_those_there_are() -> None:
    for name in FORMATS:
        layer = {"validation": {"format": name}}
        assert resolve_training_config(layers=[("x", layer)]).validation.format == name


def test_raw_text_is_validated_and_shown(llamahome: RunCommand, tmp_path: Path, base: Path) -> None:
    file = tmp_path / "tales.jsonl"
    file.write_text('{"text": "Once upon a time"}\n{"text": ""}\n{"text": "The end", "n": 1}\n')
    checked = llamahome("validate", file, "--json").json
    assert (checked["valid"], checked["invalid"]) == (2, {"empty_content": 1})
    assert checked["files"][0]["format"] == "text"
    assert llamahome("validate", file, "--format", "text").code == 0
    assert llamahome("validate", file, "--format", "alpaca").code == 1
    first = llamahome("inspect", file, "--base", base)
    assert "[Once upon a time</s>]" in first.out.replace("][", "")
    objects = [
        json.loads(line)
        for line in llamahome("inspect", file, "--base", base, "--all", "--json").out.splitlines()
    ]
    assert [bool(o["dropped"]) for o in objects] == [False, True, False]
    assert all(all(o["trained"]) for o in objects)


def test_inspect_shows_markers_as_a_job_would_have_them(
    llamahome: RunCommand, rows: Path, base: Path
) -> None:
    shown = llamahome("inspect", rows, "--base", base, "--set", "template=markers")
    text = "<s><|user|>hi<|enduser|><|assistant|>[hello<|endassistant|></s>]"
    assert text in shown.out.replace("][", "")
    assert llamahome("validate", rows, "--set", "template=markers").code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stdout_that_lacks_a_character_gets_an_escape(
    tmp_path: Path, base: Path, encoding: str
) -> None:
    file = tmp_path / "ж.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ж 你 é"}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    shown = "ж".encode(encoding, "backslashreplace").decode(encoding)
    for words in (["inspect", file, "--base", base, "--all"], ["validate", file]):
        ran = subprocess.run(
            [sys.executable, "-m", "llamahome.cli", *words],
            capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, b"")
        assert f"{shown}.jsonl" in ran.stdout.decode(encoding)
