from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamahome.cli import exits
from llamahome.errors import (
    CorruptArtifact,
    InvalidConfig,
    InvalidData,
    NotFound,
    QuotaExceeded,
    Stopped,
    Unavailable,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("x"), 1),
        (InvalidConfig("x"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "file"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (Stopped("x"), 1),
        (exits.MissingExtra("x"), 2),
        (Unavailable("x"), 3),
        (QuotaExceeded("x"), 3),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 3),
        (CorruptArtifact("x"), 4),
        (ZeroDivisionError("x"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exits.exit_code(error) == code


def test_an_error_is_one_line_with_place_message_and_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = InvalidData("role is 'x'.", file="a.jsonl", line=3, field="messages", remedy="Fix it")
    assert exits.report(error, debug=False) == 1
    assert capsys.readouterr().err == "error: a.jsonl:3, messages: role is 'x'. Fix it\n"


def test_line_breaks_and_control_characters_of_a_message_cannot_hide_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exits.report(InvalidData("one\ntwo \x1b[2Jthree"), debug=False)
    assert capsys.readouterr().err == "error: one two ?[2Jthree\n"


def test_a_traceback_is_shown_only_for_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    exits.report(NotFound("gone"), debug=True)
    assert "NotFound: gone" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_its_traceback_lies_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError) as unexpected:
        divmod(1, 0)
    assert exits.report(unexpected.value, debug=False) == 4
    line = capsys.readouterr().err
    found = re.fullmatch(r"error: unexpected ZeroDivisionError: .*details are in (\S+)\n", line)
    assert found, line
    assert "Traceback" in Path(found[1]).read_text()


def test_a_process_of_a_fleet_puts_an_unexpected_traceback_into_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ZeroDivisionError) as unexpected:
        divmod(1, 0)
    exits.report(unexpected.value, debug=False, stderr_is_log=True)
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert line.startswith("error: unexpected ZeroDivisionError: ")
    exits.report(NotFound("gone"), debug=False, stderr_is_log=True)
    assert capsys.readouterr().err == "error: gone\n"


def test_a_full_disk_does_not_hide_the_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert exits.report(ZeroDivisionError("x"), debug=False) == 4
    line = capsys.readouterr().err
    assert line.startswith("error: unexpected ZeroDivisionError: x. ")
    assert "--debug shows them" in line


def test_a_missing_module_of_an_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = ModuleNotFoundError("No module named 'peft'", name="peft.tuners")
    assert exits.report(error, debug=False) == 2
    assert "pip install 'llamahome[training]'" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    exits.report(PermissionError(errno.EACCES, "Permission denied", "data.jsonl"), debug=False)
    assert capsys.readouterr().err == "error: data.jsonl: Permission denied\n"


_WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
hidden = {hidden!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
importlib.util.find_spec = lambda name, package=None: None if name in hidden else real(name)
from llamahome.cli import main
sys.argv = ["llamahome", *{words!r}]
sys.exit(main())
"""


def _without(modules: set[str], *words: str) -> subprocess.CompletedProcess[str]:
    """The command on a machine where ``modules`` are not installed."""
    script = _WITHOUT.format(hidden=modules, words=list(words))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_a_light_install_says_which_extra_brings_the_command_line() -> None:
    bare = _without({"typer", "rich"}, "jobs")
    assert bare.returncode == 2
    assert bare.stderr.count("\n") == 1
    assert "pip install 'llamahome[fleet]'" in bare.stderr


@pytest.mark.parametrize(
    ("hidden", "words", "extra"),
    [
        ("fastapi", ("gateway",), "gateway"),
        ("torch", ("worker", "training"), "training"),
        ("transformers", ("models", "make-tiny", "x"), "training"),
        ("celery", ("worker", "validation"), "fleet"),
        ("sqlalchemy", ("ledger", "upgrade", "--state", "x"), "fleet"),
        ("uvicorn", ("up",), "gateway"),
        ("yaml", ("recipes",), "fleet"),
    ],
)
def test_a_command_without_its_extra_says_so_and_exits_2(
    hidden: str, words: tuple[str, ...], extra: str
) -> None:
    ran = _without({hidden}, *words)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"error: this command needs {hidden}. "
        f"Install the {extra} extra: pip install 'llamahome[{extra}]'\n"
    )
