"""The validation stage: every row is accounted for, whatever the cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import InvalidData, Stopped
from llamahome.local import run_job
from llamahome.schemas import (
    JobSpec,
    NewEvent,
    RunOutput,
    Stage,
    Step,
    StopReason,
    ValidationReport,
)
from llamahome.storage import LocalStorage, Storage
from llamahome.validation import stage
from support.data import job_spec, ports_at, read_artifact, row, task_of, upload, upload_rows

MIXED = (
    b"\xef\xbb\xbf" + row(1) + b"\r\n\n" + row(2) + b"\n{broken\n   \n"
    b'{"messages": [{"role": "narrator", "content": "x"}]}\n' + row(1) + b"\n\xff\xfe\xff\n"
    b'{"messages": "' + b"y" * 700 + b'"}\n' + row(3)
)  # fmt: skip
SMALL_LINES = {"max_messages": 10, "max_chars_per_message": 100, "max_line_bytes": 500}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "storage")


def validate(
    spec: JobSpec, storage: Storage, scratch: Path, events: list[NewEvent] | None = None
) -> tuple[dict[Any, RunOutput], RunOutput]:
    outputs = run_job(
        spec, storage, scratch / "scratch", stages={Stage.validation: (stage.run, stage.key)},
        on_event=lambda _, event: events.append(event) if events is not None else None,
    )  # fmt: skip
    return outputs, outputs[Stage.validation, Step.close, 0]


def report_of(storage: Storage, output: RunOutput, into: Path) -> ValidationReport:
    return ValidationReport.model_validate_json(read_artifact(storage, output, "report.json", into))


def test_every_row_is_valid_or_rejected_with_its_line_and_reason(
    storage: Storage, tmp_path: Path
) -> None:
    """BEHAVIOUR 28, 42: each line is counted, or named with its reason."""
    spec = job_spec([upload(storage, MIXED, "mixed.jsonl")], validation=SMALL_LINES)
    outputs, closed = validate(spec, storage, tmp_path)
    report = report_of(storage, closed, tmp_path)
    assert report.total == 8
    assert report.valid == 4
    assert report.invalid == {
        "invalid_json": 1, "invalid_role": 1, "line_too_long": 1, "not_utf8": 1,
    }  # fmt: skip
    assert report.files[0].blank == 2
    assert report.duplicates == 1
    assert [(e.file, e.line, e.code, e.index) for e in report.examples] == [
        ("mixed.jsonl", 4, "invalid_json", None),
        ("mixed.jsonl", 6, "invalid_role", 0),
        ("mixed.jsonl", 8, "not_utf8", None),
        ("mixed.jsonl", 9, "line_too_long", None),
    ]
    quarantine = [
        json.loads(line)
        for line in read_artifact(storage, closed, "quarantine.jsonl", tmp_path).splitlines()
    ]
    assert [bad["line"] for bad in quarantine] == [4, 6, 8, 9]
    assert [bad["raw"][:7] for bad in quarantine] == ["{broken", '{"messa', "\\xff\\xf", ""]
    rows = [
        json.loads(line)
        for line in read_artifact(
            storage, outputs[Stage.validation, Step.shard, 0], "rows.jsonl", tmp_path
        ).splitlines()
    ]
    assert [(found["file"], found["line"]) for found in rows] == [
        ("mixed.jsonl", line) for line in (1, 3, 7, 10)
    ]
    assert rows[3] == {"file": "mixed.jsonl", "line": 10, **json.loads(row(3))}
    duplicates = json.loads(read_artifact(storage, closed, "duplicates.json", tmp_path))
    assert duplicates["examples"] == [
        [{"file": "mixed.jsonl", "line": 1}, {"file": "mixed.jsonl", "line": 7}]
    ]
    assert closed.summary == {
        "total": 8, "valid": 4, "invalid": 4, "duplicates": 1, "leaked": 0,
    }  # fmt: skip


def test_any_cut_of_the_file_gives_the_same_rows_and_the_same_report(
    storage: Storage, tmp_path: Path
) -> None:
    file = upload(storage, MIXED, "mixed.jsonl")
    found = set()
    for shard_bytes in (31, 64, 100, 333, 1000, 10_000):
        spec = job_spec([file], shard_bytes=shard_bytes, validation=SMALL_LINES)
        outputs, closed = validate(spec, storage, tmp_path)
        assert closed.artifact is not None
        shards = [out for place, out in outputs.items() if place[1] is Step.shard]
        assert len(shards) == -(-len(MIXED) // shard_bytes)
        rows = b"".join(read_artifact(storage, out, "hashes.bin", tmp_path) for out in shards)
        found.add((closed.artifact.digest, rows))
    assert len(found) == 1


def test_a_byte_order_mark_inside_a_file_is_an_error_wherever_the_file_is_cut(
    storage: Storage, tmp_path: Path
) -> None:
    file = upload(storage, row(1) + b"\n\xef\xbb\xbf" + row(2) + b"\n")
    for shard_bytes in (len(row(1)) + 1, 10_000):
        spec = job_spec([file], shard_bytes=shard_bytes)
        _, closed = validate(spec, storage, tmp_path)
        assert report_of(storage, closed, tmp_path).invalid == {"invalid_json": 1}


def test_plans_name_every_shard_that_has_rows(storage: Storage, tmp_path: Path) -> None:
    training = upload_rows(storage, [row(n) for n in range(6)], "t.jsonl")
    validation = upload_rows(storage, [row(n) for n in range(90, 92)], "v.jsonl")
    empty = upload(storage, b"", "empty.jsonl")
    spec = job_spec([empty, training], [validation], shard_bytes=len(row(1)) * 2)

    outputs, _ = validate(spec, storage, tmp_path)
    shards = [output for place, output in outputs.items() if place[1] is Step.shard]
    task = task_of(spec, Stage.validation, Step.close, inputs=shards)
    result = stage.run(task, ports_at(storage, tmp_path / "c"))
    assert all(plan["today"].count("-") == 2 for plan in result.next_plans)
    named = [
        (plan["split"], plan["rows"], plan["index"], plan["first_line"])
        for plan in result.next_plans
    ]
    assert named == [
        ("training", 1, 0, 0), ("training", 2, 1, 2), ("training", 3, 2, 4),
        ("validation", 5, 3, 0),
    ]  # fmt: skip
    counted = [shards[plan["rows"]].summary["rows"] for plan in result.next_plans]
    assert sum(counted) == 8


def test_duplicates_and_leaked_rows_are_counted_across_files(
    storage: Storage, tmp_path: Path
) -> None:
    one = upload_rows(storage, [row(1), row(2), row(2)], "one.jsonl")
    two = upload_rows(storage, [row(2), row(3), b' {"conversation":' + row(1)[12:]], "two.jsonl")
    held = upload_rows(storage, [row(3), row(3), row(4)], "held.jsonl")
    events: list[NewEvent] = []
    _, closed = validate(job_spec([one, two], [held]), storage, tmp_path, events)
    report = report_of(storage, closed, tmp_path)
    assert [(counts.file, counts.valid) for counts in report.files] == [
        ("one.jsonl", 3), ("two.jsonl", 3), ("held.jsonl", 3),
    ]  # fmt: skip
    assert report.duplicates == 4
    assert report.leaked == 2
    assert any("2 validation rows also stand in the training" in e.message for e in events)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "none of 0 rows is valid"),
        (b"\n\n", "none of 0 rows is valid"),
        (b"[]\n42\n", r"none of 2 rows is valid; the first: f.jsonl:1: the row is a list"),
        ("x\n".encode("utf-16"), r"none of \d rows is valid; the first: f.jsonl:1: .*UTF-16"),
    ],
)
def test_a_file_without_a_valid_row_fails_the_job(
    storage: Storage, tmp_path: Path, content: bytes, words: str
) -> None:
    events: list[NewEvent] = []
    with pytest.raises(InvalidData, match=words) as caught:
        validate(job_spec([upload(storage, content, "f.jsonl")]), storage, tmp_path, events)
    assert caught.value.code == "invalid_training_file"
    assert events[0].message.startswith("Checked")
    if content.startswith(b"["):
        assert events[1].data["rows"][1]["line"] == 2


def test_the_share_of_invalid_rows_has_a_limit(storage: Storage, tmp_path: Path) -> None:
    file = upload_rows(storage, [*(row(n) for n in range(71)), *([b"{}"] * 29)])
    validate(job_spec([file], max_invalid_share=0.29), storage, tmp_path)
    with pytest.raises(InvalidData, match=r"29 of 100 rows are invalid, max_invalid_share is 0.28"):
        validate(job_spec([file], max_invalid_share=0.28), storage, tmp_path)
    with pytest.raises(InvalidData, match=r"rows.jsonl:72: has no key"):
        validate(job_spec([file], max_invalid_share=0), storage, tmp_path)


def test_too_few_rows_fail_the_job(storage: Storage, tmp_path: Path) -> None:
    file = upload_rows(storage, [row(n) for n in range(9)])
    with pytest.raises(InvalidData, match="9 valid training rows, at least 10") as caught:
        validate(job_spec([file], min_examples=10), storage, tmp_path)
    assert caught.value.code == "invalid_n_examples"
    validate(job_spec([file], min_examples=9), storage, tmp_path)


def test_a_validation_file_without_a_valid_row_fails_the_job(
    storage: Storage, tmp_path: Path
) -> None:
    spec = job_spec([upload_rows(storage, [row(1)])], [upload(storage, b"{}\n", "held.jsonl")])
    with pytest.raises(InvalidData, match="none of 1 validation rows is valid") as caught:
        validate(spec, storage, tmp_path)
    assert caught.value.code == "invalid_validation_file"


def test_a_shard_says_how_far_it_is_and_stops_when_asked(storage: Storage, tmp_path: Path) -> None:
    file = upload_rows(storage, [row(n) for n in range(2000)])
    plan = {"split": "training", "file": 0, "start": 0, "end": file.bytes}
    task = task_of(job_spec([file]), Stage.validation, Step.shard, plan)
    told: list[tuple[int, int | None]] = []
    ports = ports_at(storage, tmp_path / "a", on_progress=lambda d, t, _: told.append((d, t)))
    stage.run(task, ports)
    assert told == sorted(told)
    assert len(told) > 5
    assert told[-1] == (file.bytes, file.bytes)
    asked = itertools.chain([None] * 3, itertools.repeat(StopReason.pause))
    with pytest.raises(Stopped) as caught:
        stage.run(task, ports_at(storage, tmp_path / "b", should_stop=lambda: next(asked)))
    assert caught.value.code == "pause"


def test_the_key_moves_with_what_decides_the_output_and_with_nothing_else(
    storage: Storage,
) -> None:
    file = upload_rows(storage, [row(1)])
    plan = {"split": "training", "file": 0, "start": 0, "end": 10}

    def key(plan: dict[str, Any] = plan, **config: Any) -> str:
        return stage.key(task_of(job_spec([file], **config), Stage.validation, Step.shard, plan))

    assert key() == key(epochs=9, seed=1, max_length=64)
    others = {
        key(), key(plan | {"end": 11}), key(validation={"max_messages": 5}),
        stage.key(task_of(job_spec([file]), Stage.validation, Step.close)),
        stage.key(task_of(job_spec([file], min_examples=2), Stage.validation, Step.close)),
        stage.key(task_of(job_spec([file], max_invalid_share=0.5), Stage.validation, Step.close)),
    }  # fmt: skip
    assert len(others) == 6
