"""Both storages keep one contract: whole artifacts or none, verified before use."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

import pytest

from llamahome.errors import CorruptArtifact, InvalidConfig, NotFound, Unavailable
from llamahome.schemas import MANIFEST_NAME, ArtifactRef
from llamahome.storage import Storage, open_storage


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path / 'root'}"
    return f"memory://{uuid.uuid4().hex}/root"


@pytest.fixture
def storage(url: str) -> Storage:
    return open_storage(url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "below").mkdir(parents=True)
    (made / "rows.jsonl").write_bytes(b'{"a": 1}\n' * 1000)
    (made / "below" / "empty").write_bytes(b"")
    return made


class BrokenStream(io.BytesIO):
    """Gives some bytes, then fails as a lost mount would."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 0:
            raise OSError(5, "Input/output error")
        return super().read(10)


def test_a_file_is_put_once_and_read_back(storage: Storage) -> None:
    size, sha256 = storage.put("uploads/t/x", io.BytesIO(b"hello"))
    assert size == 5
    assert sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert storage.exists("uploads/t/x")
    assert storage.size("uploads/t/x") == 5
    with storage.open("uploads/t/x") as stream:
        assert stream.seek(1) == 1
        assert stream.read() == b"ello"


def test_a_file_that_is_there_is_left_as_it_is(storage: Storage) -> None:
    storage.put("uploads/t/x", io.BytesIO(b"first"))
    storage.put("uploads/t/x", io.BytesIO(b"other"))
    with storage.open("uploads/t/x") as stream:
        assert stream.read() == b"first"
    with pytest.raises(CorruptArtifact, match="5 bytes are stored, 2 were given"):
        storage.put("uploads/t/x", io.BytesIO(b"no"))


def test_a_source_that_breaks_off_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(Unavailable, match="Input/output error"):
        storage.put("uploads/t/x", BrokenStream(b"x" * 100))
    assert not storage.exists("uploads/t/x")


def test_what_is_not_there_is_not_found(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("artifacts/none")
    storage.delete("artifacts/none")
    ref = ArtifactRef(digest="0" * 64, path="artifacts/none", bytes=0)
    with pytest.raises(NotFound):
        storage.open("artifacts/none")
    with pytest.raises(NotFound):
        storage.size("artifacts/none")
    with pytest.raises(NotFound):
        storage.manifest("artifacts/none")
    with pytest.raises(NotFound):
        storage.fetch(ref, tmp_path / "into")


def test_a_published_folder_is_fetched_whole(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    ref = storage.publish(folder, "artifacts/a", kind="rows", facts={"n": 1})
    assert ref.path == "artifacts/a"
    assert ref.bytes == 9000
    assert storage.exists("artifacts/a")
    manifest = storage.manifest("artifacts/a")
    assert manifest.kind == "rows"
    assert manifest.facts == {"n": 1}
    assert [entry.name for entry in manifest.files] == ["below/empty", "rows.jsonl"]
    found = storage.fetch(ref, tmp_path / "into")
    assert (found / "rows.jsonl").read_bytes() == (folder / "rows.jsonl").read_bytes()
    assert (found / "below" / "empty").read_bytes() == b""
    with storage.open(f"{ref.path}/rows.jsonl") as stream:
        assert stream.readline() == b'{"a": 1}\n'


def test_equal_content_is_one_artifact_and_other_content_is_refused(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    first = storage.publish(folder, "artifacts/a", kind="rows")
    assert storage.publish(folder, "artifacts/a", kind="rows") == first
    elsewhere = storage.publish(folder, "artifacts/b", kind="rows")
    assert elsewhere.digest == first.digest
    (folder / "rows.jsonl").write_bytes(b"other")
    with pytest.raises(CorruptArtifact, match="already published"):
        storage.publish(folder, "artifacts/a", kind="rows")
    found = storage.fetch(first, tmp_path / "into")
    assert (found / "rows.jsonl").stat().st_size == 9000


def test_a_deleted_artifact_is_gone_and_can_be_made_again(storage: Storage, folder: Path) -> None:
    ref = storage.publish(folder, "artifacts/a", kind="rows")
    storage.delete("artifacts/a")
    assert not storage.exists("artifacts/a")
    assert storage.publish(folder, "artifacts/a", kind="rows") == ref


def test_an_artifact_of_another_digest_is_corrupt(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    ref = storage.publish(folder, "artifacts/a", kind="rows")
    wrong = ref.model_copy(update={"digest": "0" * 64})
    with pytest.raises(CorruptArtifact, match="expected 000000000000"):
        storage.fetch(wrong, tmp_path / "into")


def test_only_the_files_that_are_needed_are_fetched_and_verified(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    ref = storage.publish(folder, "artifacts/a", kind="rows")
    names = [entry.name for entry in storage.manifest("artifacts/a").files]
    for number, name in enumerate(names):
        into = storage.fetch(ref, tmp_path / f"into-{number}", only=[name])
        assert (into / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(CorruptArtifact, match="not in the manifest"):
        storage.fetch(ref, tmp_path / "none", only=["another"])


def test_symlinks_and_devices_are_not_published(storage: Storage, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link is neither"):
        storage.publish(folder, "artifacts/a", kind="rows")
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is neither"):
        storage.publish(folder, "artifacts/a", kind="rows")
    assert not storage.exists("artifacts/a")


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\0b", "a\\b", "a/.tmp-x/b"],
)
def test_a_path_that_is_not_below_the_root_is_refused(storage: Storage, path: str) -> None:
    with pytest.raises(ValueError, match="'"):
        storage.open(path)
    with pytest.raises(ValueError, match="'"):
        storage.put(path, io.BytesIO(b""))
    with pytest.raises(ValueError, match="'"):
        storage.delete(path)


def test_a_broken_manifest_is_corrupt(storage: Storage) -> None:
    for raw in (b"", b"[]", b'{"kind": "x"}', b'{"kind": "x", "files": [{"name": "../a",'
                b' "bytes": 1, "sha256": "0"}]}'):  # fmt: skip
        path = f"artifacts/{uuid.uuid4().hex}"
        storage.put(f"{path}/{MANIFEST_NAME}", io.BytesIO(raw))
        with pytest.raises(CorruptArtifact, match="unreadable manifest"):
            storage.manifest(path)


@pytest.mark.parametrize("url", ["/tmp/x", "file://host/x", "file:relative", "nosuch://x", ""])
def test_a_storage_url_that_cannot_be_used_says_so(url: str) -> None:
    with pytest.raises(InvalidConfig, match=r"storage_url.*(Write|Install)"):
        open_storage(url)
