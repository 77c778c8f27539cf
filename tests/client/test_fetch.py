"""Fetching an adapter: the folder appears whole and checked, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from llamahome.client import Client
from llamahome.client.fake import FakeServer
from llamahome.errors import CorruptArtifact, InvalidState


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"messages": []}\n')
    return path


ADAPTER = {"adapter_config.json": b"{}", "sub/weights.safetensors": b"\x00" * 100_000}


@pytest.fixture
def done(server: FakeServer, rows: Path) -> str:
    with server.client() as client:
        job = client.submit(rows, base="tiny")
    server.advance(job.id, "succeeded", artifacts=ADAPTER)
    return job.id


def found(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_fetch_writes_the_whole_adapter(server: FakeServer, done: str, tmp_path: Path) -> None:
    into = tmp_path / "a" / "adapter"
    with server.client() as client:
        assert client.fetch(done, into) == into
    assert found(into) == ADAPTER
    assert [path.name for path in into.parent.iterdir()] == ["adapter"]


def test_fetch_fills_an_empty_folder_and_refuses_any_other(
    server: FakeServer, done: str, tmp_path: Path
) -> None:
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    (full / "mine").write_text("kept")
    file.write_text("kept")
    with server.client() as client:
        client.fetch(done, empty)
        assert found(empty) == ADAPTER
        for occupied in (full, file):
            with pytest.raises(InvalidState, match=occupied.name):
                client.fetch(done, occupied)
    assert found(full) == {"mine": b"kept"}


def test_fetch_goes_on_after_a_broken_download(
    server: FakeServer, done: str, tmp_path: Path
) -> None:
    class Breaks(httpx2.BaseTransport):
        broken = 0

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            if "weights" in request.url.path and self.broken < 2:
                self.broken += 1
                return httpx2.Response(200, stream=Torn(request))
            return server.handle_request(request)

    class Torn(httpx2.SyncByteStream):
        def __init__(self, request: httpx2.Request) -> None:
            self.request = request

        def __iter__(self) -> Any:
            yield b"\x00" * 50_000
            raise httpx2.ReadError("torn", request=self.request)

    transport = Breaks()
    with Client(server.url, server.key, transport=transport, backoff_seconds=0) as client:
        client.fetch(done, tmp_path / "adapter")
    assert found(tmp_path / "adapter") == ADAPTER
    assert transport.broken == 2


@pytest.mark.parametrize("change", ["bytes", "name"])
def test_fetch_leaves_nothing_behind_when_the_adapter_cannot_be_trusted(
    server: FakeServer, done: str, tmp_path: Path, change: str
) -> None:
    def tampered(request: httpx2.Request) -> httpx2.Response:
        answer = server.handle_request(request)
        if change == "bytes" and "weights" in request.url.path:
            return httpx2.Response(200, content=b"others")
        if change == "name" and request.url.path.endswith("/artifacts"):
            listed = answer.json()
            listed["data"][0]["name"] = "../escaped"
            return httpx2.Response(200, json=listed)
        return answer

    transport = httpx2.MockTransport(tampered)
    with Client(server.url, server.key, transport=transport) as client:
        with pytest.raises(CorruptArtifact):
            client.fetch(done, tmp_path / "out" / "adapter")
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "escaped").exists()
