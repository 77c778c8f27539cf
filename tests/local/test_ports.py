"""One attempt's world in one process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from llamahome.errors import CorruptArtifact, NotFound
from llamahome.local import LocalPorts
from llamahome.schemas import CheckpointRef, FileRef, NewEvent, Ports, StopReason
from llamahome.storage import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


def test_the_ports_are_what_stages_ask_for(storage: LocalStorage, tmp_path: Path) -> None:
    ports: Ports = LocalPorts(storage, tmp_path / "scratch", "artifacts/x")
    assert list(ports.scratch.iterdir()) == []
    assert ports.should_stop() is None


def test_a_file_is_opened_and_its_size_checked(storage: LocalStorage, tmp_path: Path) -> None:
    storage.put("uploads/f", io.BytesIO(b"hello"))
    ports = LocalPorts(storage, tmp_path / "scratch", "artifacts/x")
    file = FileRef(id="f", filename="f.jsonl", path="uploads/f", sha256="0", bytes=5)
    with ports.open(file) as stream:
        assert stream.read() == b"hello"
    with pytest.raises(CorruptArtifact, match=r"f.jsonl: 5 bytes are stored, not 6"):
        ports.open(file.model_copy(update={"bytes": 6}))
    with pytest.raises(NotFound):
        ports.open(file.model_copy(update={"path": "uploads/g"}))


def test_artifacts_lie_under_the_prefix_by_kind(storage: LocalStorage, tmp_path: Path) -> None:
    ports = LocalPorts(storage, tmp_path / "scratch", "jobs/j")
    kinds = {"rows": "rows", "checkpoint-4": "checkpoint", "checkpoint-8": "checkpoint"}
    for name, kind in (kinds | {"out": "adapter"}).items():
        folder = ports.scratch / name
        folder.mkdir()
        (folder / "f").write_text(name)
        artifact = ports.publish(folder, kind)
        assert (ports.folder(artifact) / "f").read_text() == name
        assert ports.folder(artifact) == ports.folder(artifact)
    found = sorted(path.name for path in (storage.root / "jobs" / "j").iterdir())
    assert found == ["adapter", "checkpoint-4", "checkpoint-8", "rows"]


def test_what_a_stage_tells_is_kept_and_handed_on(storage: LocalStorage, tmp_path: Path) -> None:
    events: list[NewEvent] = []
    progress: list[tuple[int, int | None]] = []
    points: list[CheckpointRef] = []
    ports = LocalPorts(
        storage, tmp_path / "scratch", "jobs/j",
        on_event=events.append, on_progress=lambda done, total, _: progress.append((done, total)),
        on_checkpoint=points.append, should_stop=lambda: StopReason.pause,
    )  # fmt: skip
    ports.event("hello", level="warn")
    ports.event("step", data={"step": 3, "train_loss": 1.0})
    ports.progress(1, None)
    ports.progress(2, 5, {"loss": 1})
    (ports.scratch / "c").mkdir()
    point = CheckpointRef(step=3, artifact=ports.publish(ports.scratch / "c", "checkpoint"))
    ports.checkpoint(point)
    assert [(event.message, event.level, event.kind) for event in events] == [
        ("hello", "warn", "message"), ("step", "info", "metrics"),
    ]  # fmt: skip
    assert ports.events == events
    assert progress == [(1, None), (2, 5)]
    assert ports.last_progress == (2, 5)
    assert ports.checkpoints == points == [point]
    assert ports.should_stop() is StopReason.pause
