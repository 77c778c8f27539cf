from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from llamahome.cli.context import (
    Endpoint,
    command_line,
    endpoint,
    open_ledger,
    read_endpoint,
    write_endpoint,
)
from llamahome.config import load_settings
from llamahome.errors import InvalidConfig, InvalidData, NotFound


def _fleet(state: Path, url: str) -> Path:
    state.mkdir(parents=True, exist_ok=True)
    write_endpoint(state / "endpoint.json", Endpoint(url, "llh-file", 7))
    return state


def test_the_endpoint_file_is_private_and_reads_back(tmp_path: Path) -> None:
    state = _fleet(tmp_path, "http://127.0.0.1:1")
    file = state / "endpoint.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == {
        "url": "http://127.0.0.1:1", "key": "llh-file", "pid": 7,
    }  # fmt: skip
    assert read_endpoint(file) == Endpoint("http://127.0.0.1:1", "llh-file", 7)


def test_without_anything_named_the_fleet_of_the_working_folder_is_used(tmp_path: Path) -> None:
    _fleet(tmp_path / ".llamahome", "http://here")
    assert endpoint(None).url == "http://here"


def test_url_and_key_beat_the_endpoint_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_STATE", str(_fleet(tmp_path / "other", "http://file")))
    monkeypatch.setenv("LLAMAHOME_URL", "http://elsewhere")
    monkeypatch.setenv("LLAMAHOME_KEY", "llh-env")
    assert endpoint(None) == Endpoint("http://elsewhere", "llh-env")


def test_a_state_folder_on_the_command_line_beats_url_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_URL", "http://elsewhere")
    monkeypatch.setenv("LLAMAHOME_KEY", "llh-env")
    assert endpoint(_fleet(tmp_path / "named", "http://named")).url == "http://named"


def test_the_state_variable_names_the_endpoint_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_STATE", str(_fleet(tmp_path / "other", "http://file")))
    assert endpoint(None).url == "http://file"


@pytest.mark.parametrize(("given", "missing"), [("URL", "KEY"), ("KEY", "URL")])
def test_half_of_url_and_key_is_refused_by_the_name_of_the_other(
    monkeypatch: pytest.MonkeyPatch, given: str, missing: str
) -> None:
    monkeypatch.setenv(f"LLAMAHOME_{given}", "x")
    with pytest.raises(InvalidConfig, match=f"LLAMAHOME_{missing}: not set"):
        endpoint(None)


def test_no_fleet_at_all_says_to_start_one_or_to_set_both() -> None:
    with pytest.raises(NotFound) as none:
        endpoint(None)
    assert "`llamahome up`" in str(none.value)
    assert "LLAMAHOME_URL and LLAMAHOME_KEY" in str(none.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"url": "x"}', '{"url":"x","key":"y","pid":"z"}']
)
def test_a_torn_endpoint_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "endpoint.json"
    file.write_text(content)
    with pytest.raises(InvalidData, match="is not an endpoint file") as torn:
        read_endpoint(file)
    assert torn.value.place.file == str(file)


@pytest.mark.parametrize("name", ["a?b", "50%25", "c#d", "e f"])
def test_the_ledger_of_a_state_folder_is_found_whatever_the_folder_is_called(
    tmp_path: Path, name: str
) -> None:
    settings = load_settings(state=tmp_path / name)
    with pytest.raises(NotFound, match="no such ledger") as missing:
        open_ledger(settings)
    assert missing.value.place.file == str(tmp_path / name / "ledger.sqlite3")
    assert not (tmp_path / name).exists()
    open_ledger(settings, create=True).close()
    open_ledger(settings).close()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_suggested_command_can_be_pasted() -> None:
    assert command_line("ps", Path("a $b")) == "`llamahome ps --state 'a $b'`"
    assert command_line("ps", None) == "`llamahome ps`"
