"""A whole job in one process, with the real data stages and a training that trains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamahome.conversations import sample_path
from llamahome.conversations.tokens import read_token_rows
from llamahome.errors import InvalidData
from llamahome.local import run_job
from llamahome.local.pipeline import Stages, byte_ranges
from llamahome.preprocessing import stage as preprocessing_stage
from llamahome.schemas import (
    CheckpointRef,
    NewEvent,
    Ports,
    Stage,
    StageResult,
    StageTask,
    Step,
)
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage as validation_stage
from support.bases import write_base
from support.data import job_spec, read_artifact, row, upload, upload_rows


def fake_training(task: StageTask, ports: Ports) -> StageResult:
    """Counts what it was given, as training would read it."""
    [prepared] = task.outputs_of(Stage.preprocessing, Step.close)
    assert prepared.artifact is not None
    rows = read_token_rows(ports.folder(prepared.artifact) / "training.safetensors")
    folder = ports.scratch / "out"
    folder.mkdir()
    step = task.resume.step if task.resume else 0
    (folder / "count.json").write_text(json.dumps({"rows": len(rows), "from": step}))
    ports.event("trained", data={"step": 1})
    artifact = ports.publish(folder, "adapter")
    ports.checkpoint(CheckpointRef(step=1, artifact=artifact))
    return StageResult(artifact=artifact, summary={"rows": len(rows)})


STAGES: Stages = {
    Stage.validation: (validation_stage.run, validation_stage.key),
    Stage.preprocessing: (preprocessing_stage.run, preprocessing_stage.key),
    Stage.training: (fake_training, lambda task: None),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "chatml_generation")


def test_a_job_runs_from_its_files_to_its_adapter(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    file = upload_rows(storage, [row(n) for n in range(10)])
    spec = job_spec([file], base=base, shard_bytes=400)
    told: list[tuple[Stage, str]] = []
    points: list[CheckpointRef] = []

    def on_event(stage: Stage, event: NewEvent) -> None:
        told.append((stage, event.kind))

    outputs = run_job(
        spec, storage, tmp_path / "scratch", stages=STAGES, on_event=on_event,
        on_checkpoint=points.append,
    )  # fmt: skip
    ranges = len(list(byte_ranges(spec)))
    assert ranges > 2
    assert list(outputs) == [
        *((Stage.validation, Step.shard, i) for i in range(ranges)),
        (Stage.validation, Step.close, 0),
        *((Stage.preprocessing, Step.shard, i) for i in range(ranges)),
        (Stage.preprocessing, Step.close, 0),
        (Stage.training, Step.train, 0),
    ]
    adapter = outputs[Stage.training, Step.train, 0]
    assert json.loads(read_artifact(storage, adapter, "count.json", tmp_path)) == {
        "rows": 9, "from": 0,
    }  # fmt: skip
    assert (Stage.training, "metrics") in told
    assert [point.step for point in points] == [1]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_second_run_gives_the_same_artifacts_and_can_resume(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    spec = job_spec([upload_rows(storage, [row(n) for n in range(4)])], base=base)
    points: list[CheckpointRef] = []
    first = run_job(spec, storage, tmp_path / "a", stages=STAGES, on_checkpoint=points.append)
    again = run_job(spec, storage, tmp_path / "b", stages=STAGES, fence=2, resume=points[0])
    for place, output in first.items():
        if place[0] is not Stage.training:
            assert again[place] == output
    count = read_artifact(storage, again[Stage.training, Step.train, 0], "count.json", tmp_path)
    assert json.loads(count)["from"] == 1


def test_stages_that_are_left_out_end_the_job_early(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    spec = job_spec([upload_rows(storage, [row(1)])], base=base)
    only = {Stage.validation: STAGES[Stage.validation]}
    assert list(run_job(spec, storage, tmp_path / "s", stages=only)) == [
        (Stage.validation, Step.shard, 0), (Stage.validation, Step.close, 0),
    ]  # fmt: skip


def test_an_error_ends_the_job_and_leaves_no_scratch(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    spec = job_spec([upload(storage, b"{}\n")], base=base)
    with pytest.raises(InvalidData):
        run_job(spec, storage, tmp_path / "s", stages=STAGES)
    assert list((tmp_path / "s").iterdir()) == []


def test_the_bundled_sample_is_prepared_whole(storage: Storage, base: Path, tmp_path: Path) -> None:
    content = sample_path("support.jsonl").read_bytes()
    rows = sum(1 for line in content.splitlines() if line.strip())
    spec = job_spec([upload(storage, content)], base=base, max_length=4096)
    outputs = run_job(spec, storage, tmp_path / "s", stages=STAGES)
    checked = outputs[Stage.validation, Step.close, 0].summary
    assert (checked["total"], checked["valid"]) == (rows, rows)
    report = outputs[Stage.preprocessing, Step.close, 0].summary
    assert report["rows_in"] == rows
    assert report["stop_token_trained_share"] == 1.0
    assert report["dropped"] == {}


def test_a_job_of_raw_text_runs_to_its_adapter(
    storage: Storage, base: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"Tale {n}"}).encode() for n in range(10)]
    spec = job_spec([upload_rows(storage, lines)], base=base, shard_bytes=60)
    outputs = run_job(spec, storage, tmp_path / "scratch", stages=STAGES)
    adapter = outputs[Stage.training, Step.train, 0]
    assert json.loads(read_artifact(storage, adapter, "count.json", tmp_path))["rows"] == 9
