"""Object stores: a manifest comes last, and nothing unverified is handed out."""

from __future__ import annotations

import io
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from llamahome.errors import CorruptArtifact, Unavailable
from llamahome.storage.objects import ObjectStorage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    (made / "a").write_bytes(b"a" * 1000)
    return made


class FailingStore(MemoryFileSystem):  # type: ignore[misc]
    """Takes ``allowed`` objects, then answers as a store out of quota would."""

    cachable = False
    allowed = 0

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        self._spend()
        super().put_file(*args, **kwargs)

    def pipe_file(self, *args: Any, **kwargs: Any) -> None:
        self._spend()
        super().pipe_file(*args, **kwargs)

    def _spend(self) -> None:
        if self.allowed <= 0:
            raise OSError("quota exceeded")
        self.allowed -= 1


def test_a_publish_that_breaks_off_is_no_artifact_and_is_finished_later(folder: Path) -> None:
    (folder / "b").write_bytes(b"b")
    store = FailingStore()
    storage = ObjectStorage(store, f"/{uuid.uuid4().hex}")
    for allowed in range(3):
        store.allowed = allowed
        with pytest.raises(Unavailable, match="quota exceeded"):
            storage.publish(folder, "artifacts/x", kind="rows")
        assert not storage.exists("artifacts/x")
    store.allowed = 3
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    found = storage.fetch(ref, folder.parent / "into")
    assert sorted(path.name for path in found.iterdir()) == ["a", "b"]


class ShorteningStore(MemoryFileSystem):  # type: ignore[misc]
    """Says yes to an upload and keeps half of it."""

    cachable = False

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes()[:500])


def test_a_store_that_keeps_less_than_it_was_given_is_found_out(folder: Path) -> None:
    storage = ObjectStorage(ShorteningStore(), f"/{uuid.uuid4().hex}")
    with pytest.raises(CorruptArtifact, match="500 bytes are stored, 1000 were given"):
        storage.publish(folder, "artifacts/x", kind="rows")
    assert not storage.exists("artifacts/x")
    with pytest.raises(CorruptArtifact, match="500 bytes are stored, 1000 were given"):
        storage.put("uploads/x", io.BytesIO(b"x" * 1000))
    assert not storage.exists("uploads/x")


def test_damage_is_found_and_nothing_of_it_is_left_behind(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    storage = ObjectStorage(LocalFileSystem(auto_mkdir=True), str(root))
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    (root / "artifacts" / "x" / "a").write_bytes(b"a" * 999 + b"b")
    with pytest.raises(CorruptArtifact, match="sha256"):
        storage.fetch(ref, tmp_path / "into")
    assert not (tmp_path / "into").exists()
    (root / "artifacts" / "x" / "a").unlink()
    with pytest.raises(CorruptArtifact, match="not there"):
        storage.fetch(ref, tmp_path / "into")
