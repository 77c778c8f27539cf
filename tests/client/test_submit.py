"""What a refused submission leaves behind: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamahome.client.fake import FakeServer
from llamahome.errors import InvalidData, UserError


def test_an_empty_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    server = FakeServer()
    with server.client() as client, pytest.raises(InvalidData, match="empty.jsonl: the file is"):
        client.submit(tmp_path / "empty.jsonl", base="tiny")
    assert not server.uploads


def test_the_upload_of_a_refused_job_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    server = FakeServer()
    with server.client() as client, pytest.raises(UserError):
        client.submit(tmp_path / "a.jsonl", base="no-such-base")
    assert not server.uploads
