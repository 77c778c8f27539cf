"""Files that cannot be cut: one shard reads them whole, and their rows are cut instead."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations import Limits
from llamahome.errors import InvalidData
from llamahome.local import run_job
from llamahome.preprocessing import stage as preprocessing
from llamahome.schemas import JobSpec, RunOutput, Stage, Step, ValidationReport
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage
from llamahome.validation.shard import limits_and_format
from support.bases import write_base
from support.data import job_spec, ports_at, read_artifact, row, task_of, upload, upload_rows

ROWS = [row(n) for n in range(40)]
ARRAY = b"[\n" + b",\n".join([*ROWS[:20], b"{broken}", *ROWS[20:]]) + b"\n]\n"
STAGES = {Stage.validation: (stage.run, stage.key)}
BOTH = STAGES | {Stage.preprocessing: (preprocessing.run, preprocessing.key)}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "storage")


def shards_of(outputs: dict[Any, RunOutput]) -> list[RunOutput]:
    return [
        output
        for (of, step, _), output in outputs.items()
        if of is Stage.validation and step is Step.shard
    ]


def rows_at(storage: Storage, output: RunOutput, name: str, into: Path) -> list[Any]:
    raw = read_artifact(storage, output, name, into)
    return [json.loads(line) for line in raw.splitlines()]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "rows.jsonl.gz"])
def test_the_shard_at_0_reads_all_and_its_rows_come_in_pieces(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    content = ARRAY if "json" in name.split(".")[1:2] else b"\n".join([b"", *ROWS[:20], b"{broken}",
                                                                      *ROWS[20:]])  # fmt: skip
    content = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    file = upload(storage, content, name)
    spec = job_spec([file], shard_bytes=1000 if name.endswith("json") else 200)
    outputs = run_job(spec, storage, tmp_path / "scratch", stages=STAGES)
    shards = shards_of(outputs)
    assert len(shards) == -(-file.bytes // spec.shard_bytes) > 1
    assert [shard.summary["rows"] for shard in shards] == [40] + [0] * (len(shards) - 1)
    pieces = shards[0].summary["pieces"]
    assert sum(pieces) == 40
    assert len(pieces) > 4
    task = task_of(spec, Stage.validation, Step.close, inputs=shards)
    plans = stage.run(task, ports_at(storage, tmp_path / "close")).next_plans
    assert [plan["index"] for plan in plans] == list(range(len(pieces)))
    lines: list[int] = []
    for plan, rows in zip(plans, pieces, strict=True):
        assert (plan["rows"], plan["piece_rows"], plan["first_line"]) == (0, rows, 0)
        found = rows_at(storage, shards[0], plan["piece"], tmp_path)
        assert len(found) == rows
        lines += [one["line"] for one in found]
    assert lines == [line for line in range(2, 43) if line != 22]
    report = ValidationReport.model_validate_json(
        read_artifact(storage, outputs[Stage.validation, Step.close, 0], "report.json", tmp_path)
    )
    assert (report.total, report.valid, report.invalid) == (41, 40, {"invalid_json": 1})
    assert (report.files[0].format, report.files[0].container) == (
        "messages", name.removeprefix("rows."),
    )  # fmt: skip
    assert [(bad.file, bad.line) for bad in report.examples] == [(name, 22)]


def test_the_report_does_not_depend_on_the_size_of_the_pieces(
    storage: Storage, tmp_path: Path
) -> None:
    file = upload(storage, ARRAY, "rows.json")
    found = set()
    for shard_bytes in (100, 1000, 100_000):
        spec = job_spec([file], shard_bytes=shard_bytes)
        outputs = run_job(spec, storage, tmp_path / "scratch", stages=STAGES)
        artifact = outputs[Stage.validation, Step.close, 0].artifact
        assert artifact is not None
        found.add(artifact.digest)
    assert len(found) == 1


def test_the_same_rows_are_prepared_from_lines_and_from_pieces(
    storage: Storage, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "chatml")
    prepared = []
    for file, shard_bytes in (
        (upload_rows(storage, ROWS, "rows"), 1000),
        (upload(storage, gzip.compress(b"\n".join(ROWS)), "rows"), 500),
        (upload(storage, b"[" + b",\n".join(ROWS) + b"]", "rows"), 700),
    ):
        spec = job_spec([file], base=base, shard_bytes=shard_bytes)
        outputs = run_job(spec, storage, tmp_path / "scratch", stages=BOTH)
        count = sum(of is Stage.preprocessing and step is Step.shard for of, step, _ in outputs)
        assert count > 3
        output = outputs[Stage.preprocessing, Step.close, 0]
        names = ("training.safetensors", "validation.safetensors", "preparation.json")
        prepared.append([read_artifact(storage, output, name, tmp_path) for name in names])
    assert json.loads(prepared[0][2])["rows_in"] == 40
    assert prepared[0] == prepared[1] == prepared[2]


def test_each_piece_has_a_key_of_its_own(storage: Storage, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "chatml")
    spec = job_spec([upload(storage, ARRAY, "rows.json")], base=base, shard_bytes=1000)
    shards = shards_of(run_job(spec, storage, tmp_path / "scratch", stages=STAGES))
    close = task_of(spec, Stage.validation, Step.close, inputs=shards)
    plans = stage.run(close, ports_at(storage, tmp_path / "close")).next_plans
    keys = {
        preprocessing.key(task_of(spec, Stage.preprocessing, Step.shard, plan, inputs=shards))
        for plan in plans
    }
    assert len(keys) == len(plans) > 1
    plan = {"split": "training", "file": 0, "start": 0, "end": 1000}
    small = job_spec([spec.training_files[0]], base=base, shard_bytes=999)
    assert stage.key(task_of(spec, Stage.validation, Step.shard, plan)) != stage.key(
        task_of(small, Stage.validation, Step.shard, plan)
    )


def test_a_broken_archive_fails_the_job_and_names_the_file(
    storage: Storage, tmp_path: Path
) -> None:
    file = upload(storage, gzip.compress(b"\n".join(ROWS))[:-9], "rows.jsonl.gz")
    with pytest.raises(InvalidData, match=r"rows\.jsonl\.gz: the \.gz archive ends early"):
        run_job(job_spec([file]), storage, tmp_path / "scratch", stages=STAGES)


def test_a_page_for_people_comes_with_the_report(storage: Storage, tmp_path: Path) -> None:
    file = upload(storage, ARRAY, "rows.json")
    outputs = run_job(job_spec([file]), storage, tmp_path / "scratch", stages=STAGES)
    closed = outputs[Stage.validation, Step.close, 0]
    page = read_artifact(storage, closed, "report.md", tmp_path).decode()
    assert "41 rows = 40 valid + 1 invalid." in page
    assert "| `rows.json` | messages | json | 41 | 40 | 1 | 0 |" in page
    assert "| `rows.json` | 22 | `invalid_json` | `element 21: " in page


def test_every_shard_of_a_file_reads_it_in_the_same_format(
    storage: Storage, tmp_path: Path
) -> None:
    rows = [json.dumps({"instruction": f"{n}?", "output": f"{n}."}).encode() for n in range(30)]
    # Far from the first row the file's format still holds.
    file = upload_rows(storage, [*rows, row(1), *rows[:3]])
    spec: JobSpec = job_spec([file], shard_bytes=100)
    outputs = run_job(spec, storage, tmp_path / "scratch", stages=STAGES)
    report = ValidationReport.model_validate_json(
        read_artifact(storage, outputs[Stage.validation, Step.close, 0], "report.json", tmp_path)
    )
    assert report.files[0].format == "alpaca"
    assert (report.valid, report.invalid) == (33, {"mixed_format": 1})
    assert report.examples[0].line == 31
    assert report.duplicates == 3


def test_the_job_s_settings_are_the_limits_and_may_name_the_format() -> None:
    section = {"max_messages": 5, "max_chars_per_message": 6, "max_line_bytes": 7}
    assert limits_and_format(section) == (Limits(5, 6, 7), None)
    assert limits_and_format({**section, "format": "alpaca"}) == (Limits(5, 6, 7), "alpaca")
