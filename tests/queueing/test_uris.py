"""Which URIs may be read, and what their errors mean."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llamahome.errors import InvalidData, LlamaHomeError, NotFound, Unavailable
from llamahome.queueing.uris import is_allowed, open_uri


@pytest.mark.parametrize(
    ("folder", "uri", "allowed"),
    [
        ("s3://bucket/team", "s3://bucket/team/a.jsonl", True),
        ("s3://bucket/team/", "S3://bucket/team/deep/a.jsonl", True),
        ("s3://bucket", "s3://bucket/a.jsonl", True),
        ("s3://bucket", "s3://bucket-of-somebody-else/a.jsonl", False),
        ("s3://bucket/team", "s3://bucket/team-two/a.jsonl", False),
        ("s3://bucket/team", "s3://bucket/team", False),
        ("s3://bucket/team", "s3://bucket/team/", False),
        ("s3://bucket/team", "gs://bucket/team/a.jsonl", False),
        ("s3://bucket/team", "s3://bucket/team/../secret", False),
        ("s3://bucket/team", "s3://bucket/team/./a", False),
        ("s3://bucket/team", "s3://bucket//team/a", False),
        ("http://host/pub", "http://host/pub/%2e%2e/secret", False),
        ("http://host/pub", "http://host/pub%2F..%2Fsecret", False),
        ("http://host/pub", "http://host@evil/pub/a", False),
        ("http://host:80/pub", "http://host:8080/pub/a", False),
        ("http://host/pub", "http://host/pub/a::http://evil/a", False),
        ("http://host/pub", "http://host/pub/a?version=3", True),
        ("file:///data", "file:///data/a.jsonl", True),
        ("file:///data/", "file:///data-secret/a.jsonl", False),
        ("file:///data", "file:///data/a\x00", False),
        ("file:///data", "file://data/a", False),
        ("file:///", "file:///anything/a", True),
        ("file:///", "s3://anything/a", False),
    ],
)
def test_folders_are_compared_name_by_name(folder: str, uri: str, allowed: bool) -> None:
    assert is_allowed(uri, ("memory://other", folder)) is allowed


def test_no_link_leads_out_of_a_folder_and_one_to_the_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("x")
    (tmp_path / "secret").write_text("s")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "within").symlink_to("a")
    (tmp_path / "alias").symlink_to("data")
    data, alias = (f"file://{tmp_path}/{name}" for name in ("data", "alias"))
    assert is_allowed(f"{data}/within", (data,))
    assert is_allowed(f"{alias}/a", (alias,))
    assert not is_allowed(f"{data}/out", (data,))
    assert not is_allowed(f"{alias}/out", (alias,))
    assert not is_allowed(f"{alias}/a", ()), "nothing is allowed by itself"


def test_the_bytes_come_once_from_the_beginning(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    with open_uri(f"file://{tmp_path}/a", "training_file") as stream:
        assert not stream.seekable()
        assert stream.read(1000) + stream.read() == content


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file"), NotFound),
        (PermissionError(errno.EACCES, "Permission denied"), InvalidData),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), InvalidData),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), InvalidData),
        (OSError(errno.EIO, "Input/output error"), Unavailable),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), Unavailable),
        (TimeoutError(), Unavailable),
    ],
)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_an_error_of_the_operating_system_is_the_requests_or_may_pass(
    monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[LlamaHomeError], when: str
) -> None:
    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None: ...

        def read(self, size: int) -> bytes:
            raise error

    def open_broken(self: object, path: str, *_: object, **__: object) -> Broken:
        if when == "opening":
            raise error
        return Broken()

    monkeypatch.setattr(MemoryFileSystem, "open", open_broken)
    assert fsspec.open("memory://a/b") is not None
    with pytest.raises(kind, match="memory://a/b") as caught:
        with open_uri("memory://a/b", "training_file") as stream:
            stream.read(1)
    assert caught.value.place.field == "training_file"
