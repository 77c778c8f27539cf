"""Both storages keep one contract: whole artifacts or none, verified before use."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from llamahome.errors import (
    CorruptArtifact,
    DamagedArtifact,
    InvalidConfig,
    NotFound,
    Unavailable,
)
from llamahome.schemas import MANIFEST_NAME, ArtifactRef
from llamahome.storage import Storage, layout, open_storage


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


def change(url: str, path: str, damage: Callable[[bytes], bytes] | None) -> None:
    """Behind the storage's back; None removes the file."""
    filesystem, root = url_to_fs(url)
    whole = filesystem.cat_file(f"{root}/{path}")
    filesystem.rm_file(f"{root}/{path}")
    if damage is not None:
        assert damage(whole) != whole
        filesystem.pipe_file(f"{root}/{path}", damage(whole))


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


@pytest.mark.parametrize("damaged", [None, b"hellO", b"hell", b"hello!", b""])
def test_a_file_that_is_put_again_is_whole_afterwards(
    storage: Storage, url: str, damaged: bytes | None
) -> None:
    storage.put("uploads/t/x", io.BytesIO(b"hello"))
    if damaged is not None:
        change(url, "uploads/t/x", lambda whole: damaged)
    storage.put("uploads/t/x", io.BytesIO(b"hello"))
    with storage.open("uploads/t/x") as stream:
        assert stream.read() == b"hello"


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
    with pytest.raises(DamagedArtifact, match="artifacts/none: is not there"):
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


ROWS, MANIFEST = "artifacts/a/rows.jsonl", f"artifacts/a/{MANIFEST_NAME}"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "gone": (ROWS, None),
    "cut off": (ROWS, lambda whole: whole[:-1]),
    "empty": (ROWS, lambda whole: b""),
    "changed": (ROWS, lambda whole: bytes([whole[0] ^ 1]) + whole[1:]),
    "no manifest": (MANIFEST, lambda whole: whole[:-9]),
    "another digest": (MANIFEST, lambda whole: whole.replace(b'"sha256":"', b'"sha256":"0', 1)),
    "another name": (MANIFEST, lambda whole: whole.replace(b"rows.jsonl", b"rowz.jsonl")),
    "another kind": (MANIFEST, lambda whole: whole.replace(b'"rows"', b'"rowz"')),
    "a space": (MANIFEST, lambda whole: b" " + whole),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artifact_says_so_and_is_whole_when_it_is_published_again(
    storage: Storage, url: str, folder: Path, tmp_path: Path, name: str
) -> None:
    ref = storage.publish(folder, "artifacts/a", kind="rows")
    change(url, *DAMAGE[name])
    with pytest.raises(DamagedArtifact) as caught:
        storage.fetch(ref, tmp_path / "damaged")
    assert caught.value.place.file == ref.path
    assert layout.artifact_key(ref.path) == "a"

    assert storage.publish(folder, "artifacts/a", kind="rows") == ref

    found = storage.fetch(ref, tmp_path / "into")
    assert (found / "rows.jsonl").read_bytes() == (folder / "rows.jsonl").read_bytes()
    assert (found / "below" / "empty").read_bytes() == b""


def test_a_damaged_artifact_gives_way_to_another_one(
    storage: Storage, url: str, folder: Path, tmp_path: Path
) -> None:
    """What it was cannot be told any more, so nothing is lost with it."""
    storage.publish(folder, "artifacts/a", kind="rows")
    change(url, *DAMAGE["cut off"])
    (folder / "rows.jsonl").write_bytes(b"other")
    ref = storage.publish(folder, "artifacts/a", kind="rows")
    assert (storage.fetch(ref, tmp_path / "into") / "rows.jsonl").read_bytes() == b"other"


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
