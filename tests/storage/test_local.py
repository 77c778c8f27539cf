"""Storage in a folder under bad luck: crashes, damage, a full disk, symlinks, races."""

from __future__ import annotations

import errno
import io
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamahome.errors import CorruptArtifact, DamagedArtifact
from llamahome.schemas import MANIFEST_NAME, ArtifactRef
from llamahome.storage import LocalStorage, layout, local


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "root")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    (made / "a").write_bytes(b"a" * 1000)
    (made / "b").write_bytes(b"b" * 10)
    return made


def everything_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_nothing_temporary_is_left_after_a_publish(storage: LocalStorage, folder: Path) -> None:
    storage.publish(folder, "artifacts/x", kind="rows")
    storage.publish(folder, "artifacts/x", kind="rows")
    storage.put("uploads/f", io.BytesIO(b"x"))
    assert everything_below(storage.root) == [
        "artifacts", "artifacts/x", "artifacts/x/MANIFEST.json", "artifacts/x/a", "artifacts/x/b",
        "uploads", "uploads/f",
    ]  # fmt: skip


def test_what_a_killed_publish_left_harms_nobody(storage: LocalStorage, folder: Path) -> None:
    """Killed before the rename: a temporary folder. An older crash: a folder without manifest."""
    torn = storage.root / "artifacts" / ".tmp-x-0"
    torn.mkdir(parents=True)
    (torn / "a").write_bytes(b"a")
    half = storage.root / "artifacts" / "x"
    half.mkdir()
    (half / "a").write_bytes(b"half")
    (half / "left over").write_bytes(b"")
    assert not storage.exists("artifacts/x")
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    assert sorted(path.name for path in storage.fetch(ref, storage.root).iterdir()) == [
        MANIFEST_NAME, "a", "b",
    ]  # fmt: skip


def test_a_folder_that_holds_artifacts_is_not_replaced(storage: LocalStorage, folder: Path) -> None:
    inner = storage.publish(folder, "jobs/j/runs/r/f1/checkpoint-4", kind="checkpoint")
    with pytest.raises(ValueError, match="holds artifacts of its own"):
        storage.publish(folder, "jobs/j/runs/r/f1", kind="rows")
    storage.fetch(inner, folder)


@pytest.mark.parametrize("name", ["a", "b", MANIFEST_NAME])
def test_every_flipped_or_missing_byte_is_found(
    storage: LocalStorage, folder: Path, name: str
) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    path = storage.root / "artifacts" / "x" / name
    whole = path.read_bytes()
    path.chmod(0o644)
    for damaged in (whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:], b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifact):
            storage.fetch(ref, storage.root)
    path.write_bytes(whole)
    storage.fetch(ref, storage.root)


def test_a_missing_or_linked_file_of_an_artifact_is_found(
    storage: LocalStorage, folder: Path
) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    path = storage.root / "artifacts" / "x" / "a"
    path.unlink()
    with pytest.raises(CorruptArtifact, match="artifacts/x: a is in the manifest, but not there"):
        storage.fetch(ref, storage.root)
    path.symlink_to(folder / "a")
    with pytest.raises(CorruptArtifact, match="symlink"):
        storage.fetch(ref, storage.root)


def test_published_files_are_read_only(storage: LocalStorage, folder: Path) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    modes = {path.stat().st_mode & 0o777 for path in storage.fetch(ref, folder).iterdir()}
    assert modes == {0o444}


def test_no_path_leads_through_a_symlink(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("s")
    (storage.root / "link").symlink_to(tmp_path / "outside")
    for path in ("link/secret", "link"):
        with pytest.raises(ValueError, match="symlink"):
            storage.open(path)
    with pytest.raises(ValueError, match="symlink"):
        storage.put("link/new", io.BytesIO(b"x"))
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == ["secret"]


_FULL_DISK = """
import resource, sys, io, pathlib
from llamahome.errors import Unavailable
from llamahome.storage import LocalStorage
storage = LocalStorage(pathlib.Path(sys.argv[1]))
folder = pathlib.Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for work in (
    lambda: storage.publish(folder, "artifacts/x", kind="rows"),
    lambda: storage.put("uploads/x", io.BytesIO(b"x" * 1000)),
):
    try:
        work()
    except Unavailable as error:
        print(error.code, error.remedy)
"""


def test_a_full_disk_is_unavailable_and_leaves_nothing_half_made(
    storage: LocalStorage, folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(storage.root), str(folder)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "storage_full Free space there and try again\n" * 2, done.stderr
    assert everything_below(storage.root) == ["artifacts", "uploads"]
    storage.publish(folder, "artifacts/x", kind="rows")


def test_what_is_not_needed_is_not_read(storage: LocalStorage, folder: Path) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    (storage.root / "artifacts" / "x" / "b").unlink()
    assert storage.fetch(ref, folder, only=["a"]).samefile(storage.root / "artifacts" / "x")
    with pytest.raises(CorruptArtifact, match="not there"):
        storage.fetch(ref, folder, only=["a", "b"])


def test_an_adopted_folder_is_the_same_artifact_without_a_copy(
    storage: LocalStorage, folder: Path
) -> None:
    copied = storage.publish(folder, "artifacts/x", kind="rows")
    adopted = storage.publish(folder, "artifacts/y", kind="rows", adopt=True)
    assert adopted.digest == copied.digest
    kept = storage.root / "artifacts" / "y" / "a"
    assert kept.samefile(folder / "a")
    assert kept.stat().st_mode & 0o777 == 0o444
    shutil.rmtree(folder)
    assert (storage.fetch(adopted, folder) / "a").read_bytes() == b"a" * 1000


def test_a_folder_that_cannot_be_linked_is_copied(
    storage: LocalStorage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    ref = storage.publish(folder, "artifacts/x", kind="rows", adopt=True)
    kept = storage.fetch(ref, folder) / "a"
    assert kept.read_bytes() == b"a" * 1000
    assert not kept.samefile(folder / "a")


def test_two_attempts_that_publish_at_once_agree(storage: LocalStorage, folder: Path) -> None:
    start = threading.Barrier(8)
    refs: list[ArtifactRef] = []

    def attempt() -> None:
        start.wait()
        refs.append(storage.publish(folder, "artifacts/x", kind="rows"))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refs) == 8
    assert len({ref.digest for ref in refs}) == 1
    assert not [name for name in everything_below(storage.root) if ".tmp-" in name]
    storage.fetch(refs[0], folder)


def spoil(storage: LocalStorage, name: str = "a") -> None:
    path = storage.root / "artifacts" / "x" / name
    path.unlink()
    path.write_bytes(b"spoilt")


def test_two_attempts_that_mend_at_once_agree(storage: LocalStorage, folder: Path) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    for _ in range(20):
        spoil(storage)
        with ThreadPoolExecutor(4) as pool:
            mended = [
                pool.submit(storage.publish, folder, "artifacts/x", kind="rows") for _ in range(4)
            ]
        assert [each.result() for each in mended] == [ref] * 4
        storage.fetch(ref, folder)
        assert everything_below(storage.root) == [
            "artifacts", "artifacts/x", "artifacts/x/MANIFEST.json", "artifacts/x/a",
            "artifacts/x/b",
        ]  # fmt: skip


def test_who_reads_what_is_whole_of_a_damaged_artifact_is_not_disturbed(
    storage: LocalStorage, folder: Path
) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    done = threading.Event()

    def read() -> int:
        times = 0
        while not done.is_set() or not times:
            place = storage.fetch(ref, folder, only=["b"])
            assert (place / "b").read_bytes() == b"b" * 10
            times += 1
        return times

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for _ in range(50):
            spoil(storage)
            storage.publish(folder, "artifacts/x", kind="rows")
        done.set()
        assert reading.result() > 0


def test_where_folders_cannot_change_places_a_damaged_one_is_replaced_too(
    storage: LocalStorage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    spoil(storage)
    monkeypatch.setattr(local, "exchange", lambda a, b: False)
    assert storage.publish(folder, "artifacts/x", kind="rows") == ref
    storage.fetch(ref, folder)
    assert len(everything_below(storage.root)) == 5


def test_a_file_or_folders_in_the_wrong_place_are_damage(
    storage: LocalStorage, folder: Path
) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "c").write_bytes(b"c")
    ref = storage.publish(folder, "artifacts/x", kind="rows")
    place = storage.root / "artifacts" / "x"
    (place / "a").unlink()
    (place / "a").mkdir()
    shutil.rmtree(place / "below")
    (place / "below").write_bytes(b"")
    for name in ("a", "below/c"):
        with pytest.raises(DamagedArtifact, match=f"{name} is in the manifest, but not there"):
            storage.fetch(ref, folder, only=[name])
    assert storage.publish(folder, "artifacts/x", kind="rows") == ref
    storage.fetch(ref, folder)
    shutil.rmtree(place)
    place.write_bytes(b"")
    with pytest.raises(DamagedArtifact, match="is not there"):
        storage.fetch(ref, folder)
    assert storage.publish(folder, "artifacts/x", kind="rows") == ref


def test_the_layout_keeps_tenants_jobs_and_attempts_apart() -> None:
    assert layout.upload_path("acme", "ab12") == "uploads/acme/ab12"
    assert layout.artifact_path("ab12") == "artifacts/ab12"
    assert layout.attempt_path("ftjob-1", "run-2", 3) == "jobs/ftjob-1/runs/run-2/f3"
    assert (
        layout.checkpoint_path("ftjob-1", "run-2", 3, 40)
        == "jobs/ftjob-1/runs/run-2/f3/checkpoint-40"
    )
    assert layout.model_path("ftjob-1", 3) == "models/ftjob-1/f3"
    assert layout.artifact_key(layout.artifact_path("ab12")) == "ab12"
    for other in ("artifacts", "artifacts/ab/rows.jsonl", layout.model_path("ftjob-1", 3)):
        assert layout.artifact_key(other) is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "a..b", ".tmp-x", "a b", "a\0", "x" * 300])
def test_a_name_that_cannot_stand_in_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be part"):
        layout.upload_path(name, "ab12")
    with pytest.raises(ValueError, match="cannot be part"):
        layout.artifact_path(name)
