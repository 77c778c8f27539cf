"""The parts of a run in one folder: its record, its inputs, the checkpoints it keeps."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from llamahome.errors import InvalidData, InvalidState
from llamahome.local.folder import WEIGHTS_NAME, held
from llamahome.local.inputs import StorageWithInputs, read_inputs
from llamahome.local.kept import KeptCheckpoints
from llamahome.local.record import RunRecord
from llamahome.schemas import CheckpointRef
from llamahome.storage import LocalStorage
from support.disks import separate_file_system

PREFIX = "jobs/local/runs/training-train-0"


def saved(storage: LocalStorage, root: Path, fence: int, step: int, best: int | None) -> None:
    folder = root / f"made-{fence}-{step}"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"state": {"stopping": {"best_step": best}}}))
    storage.publish(folder, f"{PREFIX}/f{fence}/checkpoint-{step:08d}", kind="checkpoint")


def point(storage: LocalStorage, root: Path, step: int, *, best: bool = False) -> CheckpointRef:
    folder = root / f"new-{step}"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    path = f"{PREFIX}/f9/checkpoint-{step:08d}"
    artifact = storage.publish(folder, path, kind="checkpoint")
    return CheckpointRef(step=step, artifact=artifact, best=best)


def test_the_newest_and_the_best_checkpoint_stay(tmp_path: Path) -> None:
    """BEHAVIOUR 73: save_total_limit in one folder; a corrupt one is not used."""
    storage = LocalStorage(tmp_path / "storage")
    saved(storage, tmp_path, 1, 2, best=2)
    saved(storage, tmp_path, 1, 4, best=2)
    saved(storage, tmp_path, 2, 6, best=2)
    told: list[str] = []
    damaged = tmp_path / "storage" / PREFIX / "f2" / "checkpoint-00000006" / "state.json"
    damaged.chmod(0o644)
    damaged.write_text("{}")

    kept = KeptCheckpoints(storage, 2)
    assert kept.find(told.append) == 2
    assert [each.step for each in kept.newest_first()] == [4, 2]
    assert len(told) == 1
    assert "step 6 is corrupt" in told[0]
    kept.add(point(storage, tmp_path, 6))
    assert [each.step for each in kept.newest_first()] == [6, 2]
    kept.add(point(storage, tmp_path, 8, best=True))
    kept.add(point(storage, tmp_path, 10))
    assert [each.step for each in kept.newest_first()] == [10, 8]
    left = sorted(path.name for path in (tmp_path / "storage").rglob("checkpoint-*"))
    assert left == ["checkpoint-00000008", "checkpoint-00000010"]


def test_checkpoints_may_lie_on_another_file_system_than_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a link to a larger disk; the adapter appears whole there, too."""
    large, out = tmp_path / "large", tmp_path / "out"
    large.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(large)
    separate_file_system(monkeypatch, large)
    with held(out) as folder:
        folder.begin(RunRecord((), (), "b" * 64, {}), resume=False)
        published = folder.work / "jobs" / "j" / "runs" / "r" / "f1" / "adapter"
        published.mkdir(parents=True)
        (published / WEIGHTS_NAME).write_bytes(b"weights")
        folder.finish(published)
        assert folder.finished
    assert (out / "adapter" / WEIGHTS_NAME).read_bytes() == b"weights"
    assert sorted(path.name for path in out.iterdir()) == [".lock", "adapter", "checkpoints"]
    assert not published.exists()


def test_a_link_to_where_checkpoints_lie_is_emptied_and_stays(tmp_path: Path) -> None:
    large, out = tmp_path / "large", tmp_path / "out"
    large.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(large)
    record = RunRecord((), (), "b" * 64, {})
    with held(out) as folder:
        folder.begin(record, resume=False)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").write_text("")
        (large / "link").symlink_to(tmp_path / "mine")
        folder.abandon()
        assert list(large.iterdir()) == []
        assert (tmp_path / "mine" / "file").exists()
        assert folder.work.is_symlink()
        folder.begin(record, resume=False)
        (folder.work / "jobs" / "j" / "runs" / "r" / "f1" / "checkpoint-1").mkdir(parents=True)
        assert folder.begin(record, resume=False)
        assert folder.earlier.is_symlink()
        published = folder.work / "adapter"
        published.mkdir()
        folder.finish(published)
        assert list(large.iterdir()) == []
    assert sorted(path.name for path in out.iterdir()) == [".lock", "adapter", "checkpoints"]


def test_a_folder_that_cannot_be_held_for_lack_of_space_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*values: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"), held(out):
            pass
    assert not out.exists()
    with held(out):  # as the same process may, once there is room
        assert "pid" in (out / ".lock").read_text()


def test_a_record_names_everything_that_differs(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    then = RunRecord(("a" * 64,), (), "b" * 64, {"seed": 1, "lora": {"r": 8}, "max_workers": 4})
    then.write(file)
    read = RunRecord.read(file)
    assert read == then
    read.check(RunRecord(then.training, (), then.base, {**then.config, "max_workers": 1}), tmp_path)
    now = RunRecord(("c" * 64,), ("d" * 64,), "e" * 64, {"seed": 2, "lora": {"r": 16}})
    with pytest.raises(InvalidState) as caught:
        read.check(now, tmp_path)
    for text in (
        "training data (sha256 aaaaaaaaaaaa, now cccccccccccc)",
        "validation data (sha256 none, now dddddddddddd)",
        "base (sha256 bbbbbbbbbbbb, now eeeeeeeeeeee)", "lora.r (8, now 16)", "seed (1, now 2)",
    ):  # fmt: skip
        assert text in caught.value.message
    assert caught.value.code == "checkpoint_mismatch"
    file.write_text("{")
    assert RunRecord.read(file) is None


def test_inputs_are_read_where_they_lie_and_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(name)
    (tmp_path / "c.jsonl").write_text("c")
    files = [tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl", tmp_path / "c.jsonl"]

    inputs = read_inputs(files, "training")

    assert [each.ref.filename for each in inputs] == ["a/rows.jsonl", "b/rows.jsonl", "c.jsonl"]
    storage = StorageWithInputs(tmp_path / "storage", inputs)
    for each, file in zip(inputs, files, strict=True):
        assert storage.size(each.ref.path) == 1
        with storage.open(each.ref.path) as stream:
            assert stream.read() == file.read_bytes()
    assert list((tmp_path / "storage").iterdir()) == []
    os.utime(files[0], ns=(0, 0))
    with pytest.raises(InvalidData, match="changed while"):
        storage.open(inputs[0].ref.path)


def test_a_file_whose_name_is_not_utf_8_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """No report could name it."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    for path, shown in (
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jsonl")), r"bad\xff.jsonl"),
        (folder / "rows.jsonl", r"caf\xe9/rows.jsonl"),
    ):
        path.write_bytes(b"{}")
        with pytest.raises(InvalidData, match="not UTF-8") as caught:
            read_inputs([path, tmp_path / "rows.jsonl"], "training")
        assert caught.value.place.file == shown
        assert "Rename" in str(caught.value.remedy)
        assert str(caught.value).encode()
    # What is not in the name is nobody's business.
    (folder / "other.jsonl").write_bytes(b"{}")
    [one] = read_inputs([folder / "other.jsonl"], "training")
    assert one.ref.filename == "other.jsonl"
