from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from llamahome.cli.places import gateway_address, private_folder
from llamahome.config import load_settings
from llamahome.errors import InvalidConfig


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


@pytest.mark.parametrize("content", [None, "up.lock", "ledger.sqlite3"])
def test_a_state_folder_is_closed_to_others(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    if content:
        (folder / content).touch()
    assert _mode(private_folder(folder)) == 0o700


def test_a_new_one_is_made_closed_with_the_folders_above_it(tmp_path: Path) -> None:
    assert _mode(private_folder(tmp_path / "a" / "b")) == 0o700


def test_a_folder_that_is_somebodys_is_left_as_it_is_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o755)
    (home / "letters.txt").touch()
    assert _mode(private_folder(home)) == 0o755
    assert f"others can read {home}" in capsys.readouterr().err


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private_folder(tmp_path / "file")


def test_port_0_becomes_a_free_one_of_this_machine() -> None:
    host, port = gateway_address(load_settings())
    assert host == "127.0.0.1"
    assert port > 0


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("localhost", "localhost")]
)
def test_clients_of_this_machine_reach_a_gateway_that_listens_everywhere(
    host: str, reached: str
) -> None:
    assert gateway_address(load_settings(gateway_host=host))[0] == reached


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = load_settings(gateway_port=taken.getsockname()[1])
        with pytest.raises(InvalidConfig, match="cannot be listened on"):
            gateway_address(settings)
