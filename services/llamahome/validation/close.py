"""All shards' counts -> one report, the quarantine file, duplicates, and the shards to prepare.

The artifact: ``report.json`` (schemas.ValidationReport), ``report.md`` (the same, to read),
``quarantine.jsonl`` (every rejected row,
with the line of its file) and ``duplicates.json``. It is the same however the files were cut.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llamahome.conversations import dump, shift_lines
from llamahome.errors import InvalidData
from llamahome.schemas import (
    FileCounts,
    FileRef,
    JobSpec,
    JsonObject,
    Ports,
    Rejected,
    Stage,
    StageResult,
    StageTask,
    Step,
    ValidationReport,
)
from llamahome.validation.duplicates import Duplicates, find_duplicates
from llamahome.validation.page import report_page
from llamahome.validation.shard import (
    COUNTS_NAME,
    HASHES_NAME,
    LINES_NAME,
    REJECTED_NAME,
    piece_name,
)

REPORT_NAME = "report.json"
PAGE_NAME = "report.md"
QUARANTINE_NAME = "quarantine.jsonl"
DUPLICATES_NAME = "duplicates.json"
EXAMPLES = 20
_REMEDY = "Correct them; `llamahome validate FILE` tells what is wrong with each"
# The rows themselves are not read again.
_READ = (COUNTS_NAME, REJECTED_NAME, HASHES_NAME, LINES_NAME)


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A checked range: ``number`` is its run's, ``first_line`` the lines of its file before it."""

    number: int
    split: str
    index: int
    rows: int
    first_line: int
    folder: Path
    pieces: tuple[int, ...]


def close(task: StageTask, ports: Ports) -> StageResult:
    """Report, thresholds, next plans. Raises InvalidData, CorruptArtifact, Unavailable."""
    shards = _shards(task, ports)
    folder = ports.scratch / "report"
    folder.mkdir()
    duplicates = find_duplicates(shards, task.spec)
    examples = _write_quarantine(folder / QUARANTINE_NAME, shards)
    report = _report(task.spec, shards, duplicates, examples)
    (folder / REPORT_NAME).write_bytes(dump(report.model_dump(mode="json")) + b"\n")
    (folder / PAGE_NAME).write_text(report_page(report), encoding="utf-8")
    (folder / DUPLICATES_NAME).write_bytes(dump(duplicates.to_json()) + b"\n")
    _tell(report, ports)
    _check(report, task.spec)
    summary = {
        "total": report.total, "valid": report.valid, "invalid": sum(report.invalid.values()),
        "duplicates": report.duplicates, "leaked": report.leaked,
    }  # fmt: skip
    return StageResult(
        artifact=ports.publish(folder, "rows"), summary=summary, next_plans=_next_plans(shards)
    )


def _shards(task: StageTask, ports: Ports) -> list[Shard]:
    """In the order of their files, training before validation, each with its first line."""
    outputs = sorted(
        task.outputs_of(Stage.validation, Step.shard),
        key=lambda output: (
            output.summary["split"], output.summary["index"], output.summary["start"], output.shard,
        ),
    )  # fmt: skip
    lines: Counter[tuple[str, int]] = Counter()
    shards = []
    for output in outputs:
        assert output.artifact is not None, "a validation shard always has an artifact"
        facts = output.summary
        place = (facts["split"], facts["index"])
        folder = ports.folder(output.artifact, only=_READ)
        shards.append(
            Shard(
                number=output.shard, split=facts["split"], index=facts["index"],
                rows=facts["rows"], first_line=lines[place], folder=folder,
                pieces=tuple(facts.get("pieces", ())),
            )
        )  # fmt: skip
        lines[place] += facts["lines"]
    return shards


def _write_quarantine(path: Path, shards: Sequence[Shard]) -> tuple[Rejected, ...]:
    """All rejected rows, in file order. Returns the first of them."""
    examples: list[Rejected] = []
    with path.open("wb") as out:
        for shard in shards:
            with (shard.folder / REJECTED_NAME).open("rb") as rejected:
                for raw in shift_lines(rejected, shard.first_line):
                    out.write(raw)
                    if len(examples) < EXAMPLES:
                        body = json.loads(raw)
                        del body["raw"]
                        examples.append(Rejected.model_validate(body))
    return tuple(examples)


def _report(
    spec: JobSpec, shards: Sequence[Shard], duplicates: Duplicates, examples: tuple[Rejected, ...]
) -> ValidationReport:
    files = [
        _file_counts(file, [shard for shard in shards if (shard.split, shard.index) == place])
        for place, file in _files(spec)
    ]
    invalid: Counter[str] = Counter()
    for counts in files:
        invalid.update(counts.invalid)
    return ValidationReport(
        files=tuple(files),
        total=sum(counts.total for counts in files),
        valid=sum(counts.valid for counts in files),
        invalid=dict(sorted(invalid.items())),
        duplicates=duplicates.rows,
        leaked=duplicates.leaked,
        examples=examples,
    )


def _files(spec: JobSpec) -> list[tuple[tuple[str, int], FileRef]]:
    sides = (("training", spec.training_files), ("validation", spec.validation_files))
    return [((split, i), file) for split, files in sides for i, file in enumerate(files)]


def _file_counts(file: FileRef, shards: Sequence[Shard]) -> FileCounts:
    total = valid = blank = 0
    invalid: Counter[str] = Counter()
    format = container = None
    for shard in shards:
        counts = FileCounts.model_validate_json((shard.folder / COUNTS_NAME).read_bytes())
        total, valid, blank = total + counts.total, valid + counts.valid, blank + counts.blank
        invalid.update(counts.invalid)
        # Every shard looks at the file's first rows, so all say the same.
        format, container = counts.format, counts.container
    return FileCounts(
        file=file.filename, total=total, valid=valid, blank=blank,
        invalid=dict(sorted(invalid.items())), format=format, container=container,
    )  # fmt: skip


def _tell(report: ValidationReport, ports: Ports) -> None:
    bad = sum(report.invalid.values())
    counts = {
        "total": report.total, "valid": report.valid, "invalid": report.invalid,
        "files": {f.file: {"format": f.format, "container": f.container} for f in report.files},
    }  # fmt: skip
    ports.event(f"Checked {report.total} rows: {report.valid} valid, {bad} invalid", data=counts)
    if report.examples:
        shown = [example.model_dump(mode="json") for example in report.examples]
        ports.event("The first rows that cannot be used", level="warn", data={"rows": shown})
    if report.duplicates:
        ports.event(f"{report.duplicates} rows are duplicates", level="warn")
    if report.leaked:
        ports.event(
            f"{report.leaked} validation rows also stand in the training files, so the validation "
            "loss will look better than it is", level="warn",
        )  # fmt: skip


def _check(report: ValidationReport, spec: JobSpec) -> None:
    """The thresholds. Raises InvalidData."""
    bad = sum(report.invalid.values())
    first = _first_problem(report)
    training = report.files[: len(spec.training_files)]
    if report.valid == 0:
        raise InvalidData(
            f"none of {report.total} rows is valid{first}", file=training[0].file, remedy=_REMEDY
        )
    share = spec.config["max_invalid_share"]
    # The 1e-9 undoes binary fractions: 0.29 of 100 rows are 29.
    if bad > share * report.total + 1e-9:
        raise InvalidData(
            f"{bad} of {report.total} rows are invalid, max_invalid_share is {share}{first}",
            field="max_invalid_share",
            remedy="Correct the rows, or raise max_invalid_share to leave them out",
        )
    valid = sum(counts.valid for counts in training)
    if valid < spec.min_examples:
        raise InvalidData(
            f"{valid} valid training rows, at least {spec.min_examples} are needed{first}",
            code="invalid_n_examples", file=training[0].file,
        )  # fmt: skip
    validation = report.files[len(spec.training_files) :]
    if validation and not any(counts.valid for counts in validation):
        raise InvalidData(
            f"none of {sum(counts.total for counts in validation)} validation rows is valid{first}",
            code="invalid_validation_file", file=validation[0].file, remedy=_REMEDY,
        )  # fmt: skip


def _first_problem(report: ValidationReport) -> str:
    if not report.examples:
        return ""
    first = report.examples[0]
    return f"; the first: {first.file}:{first.line}: {first.reason}"


def _next_plans(shards: Sequence[Shard]) -> tuple[JsonObject, ...]:
    # Some templates write the date. One for the whole job, whenever its shards are prepared.
    today = datetime.date.today().isoformat()
    plans: list[JsonObject] = []
    for shard in shards:
        plan = {"split": shard.split, "rows": shard.number, "first_line": shard.first_line,
                "today": today}  # fmt: skip
        if shard.pieces:
            # Part of the shard's rows: the file they are in, and how many they are.
            plans += [
                plan | {"piece": piece_name(number), "piece_rows": rows}
                for number, rows in enumerate(shard.pieces)
            ]
        elif shard.rows:
            plans.append(plan)
    return tuple(plan | {"index": index} for index, plan in enumerate(plans))
