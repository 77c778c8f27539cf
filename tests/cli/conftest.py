from __future__ import annotations

import dataclasses
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llamahome.cli.app import run
from llamahome.cli.context import Endpoint, write_endpoint
from llamahome.client.fake import FakeServer
from llamahome.schemas import JsonObject


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


RunCommand = Callable[..., Ran]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in an empty folder, with nothing of the caller's LLAMAHOME_* settings."""
    for name in list(os.environ):
        if name.startswith("LLAMAHOME_") and not name.startswith("LLAMAHOME_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def llamahome(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Run a command line in this process."""

    def command(*words: str | Path) -> Ran:
        capsys.readouterr()
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A folder that may be registered; nothing loads it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    return folder


class Gateway:
    """The client's fake behind a real socket, so that the connection rule is tested with it.

    ``lists`` answers what the fake has none of: a list by its path.
    """

    def __init__(self) -> None:
        self.fake = FakeServer()
        self.lists: dict[str, list[JsonObject]] = {}
        self.before_answer: Callable[[str], None] = lambda path: None
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Gateway:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(gateway) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                request = httpx2.Request(
                    self.command, gateway.url + self.path, headers=dict(self.headers), content=body
                )
                gateway.before_answer(request.url.path)
                answer = gateway.fake.handle_request(request)
                if answer.status_code == 200 and request.url.path in gateway.lists:
                    data = gateway.lists[request.url.path]
                    answer = httpx2.Response(200, json={"data": data, "has_more": False})
                self.send_response(answer.status_code)
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                """Quiet: the tests read stderr."""

        return Handler


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A running fake, found through the working folder's endpoint file."""
    with Gateway() as running:
        (tmp_path / ".llamahome").mkdir()
        file = tmp_path / ".llamahome" / "endpoint.json"
        write_endpoint(file, Endpoint(running.url, running.fake.key, os.getpid()))
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file to hand over; the fake does not read it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    return path
