"""Values that the rendering tests share."""

from __future__ import annotations

from typing import Any

from llamahome.client import EventInfo, JobInfo
from llamahome.schemas import (
    Attempt,
    AttemptOutcome,
    FileCounts,
    JobReport,
    PreparationReport,
    Run,
    RunState,
    SplitCounts,
    Stage,
    Step,
    TrainingMetrics,
    TrainingReport,
    ValidationReport,
)

JOB_ID = "ftjob-1"


def job(state: str = "running", **fields: Any) -> JobInfo:
    body = {
        "id": JOB_ID, "model": "tiny", "x_state": state, "status": "running",
        "created_at": 1_700_000_000, "training_file": "file-1",
    }  # fmt: skip
    return JobInfo.model_validate(body | fields)


def training(done: int, total: int | None = 120, **data: Any) -> JobInfo:
    progress = {"stage": "training", "done": done, "total": total, "data": data}
    return job("running", x_progress=progress)


def run(
    stage: Stage = Stage.validation,
    step: Step = Step.shard,
    shard: int = 0,
    state: RunState = RunState.done,
    attempts: tuple[Attempt, ...] = (),
) -> Run:
    return Run(
        id=f"{stage}-{step}-{shard}", job_id=JOB_ID, stage=stage, step=step, shard=shard,
        state=state, fence=1, attempts_without_progress=0, progress={}, attempts=attempts,
    )  # fmt: skip


def attempt(number: int = 1, **fields: Any) -> Attempt:
    body = {
        "number": number, "fence": number, "worker": "validation-host-7", "host": "host",
        "pid": 6 + number, "queue_wait_seconds": 0.25, "run_seconds": 1.5,
        "outcome": AttemptOutcome.succeeded,
    }  # fmt: skip
    return Attempt.model_validate(body | fields)


def event(message: str, *, id: str = "ftevent-1", **fields: Any) -> EventInfo:
    body = {"id": id, "created_at": 1_700_000_000, "level": "info", "message": message}
    return EventInfo.model_validate(body | fields)


def report() -> JobReport:
    counts = FileCounts(file="rows.jsonl", total=12, valid=10, invalid={"bad_json": 2})
    return JobReport(
        job_id=JOB_ID,
        base="tiny",
        validation=ValidationReport(
            files=(counts,), total=12, valid=10, invalid={"bad_json": 2}, duplicates=1
        ),
        preparation=PreparationReport(
            rows_in=10,
            training=SplitCounts(rows=8, tokens=1000, trained_tokens=400, longest=90),
            validation=SplitCounts(rows=1, tokens=90, trained_tokens=40, longest=90),
            dropped={"too_long": 1},
            truncated_rows=3,
            stop_token_trained_share=1.0,
        ),
        training=TrainingReport(
            steps=30, epochs=3, seed=42, eval_loss_before=5.1234, eval_loss_after=3.2101,
            best_step=20, best_eval_loss=3.2001, trained_tokens=1200, trainable_parameters=4096,
            base_unchanged=True, adapter_moved=True, resumed_from=(10,), precision="fp32",
            mode="fast",
            metrics=TrainingMetrics(
                train_loss=3.0, eval_loss=3.2101, learning_rate=1e-4, epoch=3, step=30
            ),
        ),
        lineage={"data": "d"},
    )  # fmt: skip
