"""The command line is a contract that scripts rely on, so its help is frozen.

After a wanted change: LLAMAHOME_TEST_WRITE=1 pytest tests/cli/test_help.py, and read the diff.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from llamahome.cli.app import app

from .conftest import RunCommand

SNAPSHOT = Path(__file__).with_name("help.txt")


def _commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, *path, name)


ALL = sorted(_commands(typer.main.get_command(app)))


def test_the_help_of_every_command_is_as_it_was(
    llamahome: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for path in ALL:
        ran = llamahome(*path, "--help")
        assert ran.code == 0
        lines = [line.rstrip() for line in ran.out.strip().splitlines()]
        shown += [f"$ {' '.join(('llamahome', *path, '--help'))}", *lines, ""]
    text = "\n".join(shown)
    if os.environ.get("LLAMAHOME_TEST_WRITE"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert text == SNAPSHOT.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [path for path in ALL if path], ids="-".join)
def test_every_command_says_what_it_does_in_one_line_that_fits(path: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    first = (command.help or "").split("\n")[0]
    assert 5 < len(first) <= 64
    assert first.endswith(".")


# What prints nothing but is done or not done: no data, so no --json.
WITHOUT_JSON = {("up",), ("health",), ("worker",), ("coordinator",), ("gateway",)}
GROUPS = {("keys",), ("ledger",)}


@pytest.mark.parametrize("path", [path for path in ALL if path], ids="-".join)
def test_every_command_takes_state_and_every_one_that_prints_data_json(
    path: tuple[str, ...],
) -> None:
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    options = {option for param in command.params for option in param.opts}
    assert ("--json" in options) == (path not in WITHOUT_JSON | GROUPS)
    assert ("--state" in options) == (path not in GROUPS)


def test_the_bare_command_shows_its_help(llamahome: RunCommand) -> None:
    assert llamahome().out == llamahome("--help").out


def test_a_bare_group_shows_its_help_and_is_a_usage_error(llamahome: RunCommand) -> None:
    ran = llamahome("keys")
    assert (ran.code, ran.out) == (2, "")
    assert "create" in ran.err


def test_version_is_the_packages(llamahome: RunCommand) -> None:
    ran = llamahome("--version")
    assert (ran.code, ran.out.strip()) == (0, "0.1.0")
