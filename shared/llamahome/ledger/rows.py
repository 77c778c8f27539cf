"""Rows to views."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from sqlalchemy.engine import Row

from llamahome.schemas import (
    ArtifactRef,
    Attempt,
    AttemptOutcome,
    BaseRef,
    Event,
    FileRef,
    Job,
    JobError,
    JobSpec,
    JobState,
    Run,
    RunOutput,
    RunState,
    Stage,
    Step,
    StoredFile,
    Worker,
)


def job_view(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        tenant=row.tenant,
        kind=row.kind,
        submission_id=row.submission_id,
        spec=_spec(row),
        state=JobState(row.state),
        cancel_requested=row.cancel_requested,
        pause_requested=row.pause_requested,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=JobError.model_validate(row.error) if row.error else None,
        adapter=ArtifactRef.model_validate(row.adapter) if row.adapter else None,
        result=row.result or {},
        retry_of=row.retry_of,
    )


def _spec(row: Row[Any]) -> JobSpec:
    """The job's spec, or a stand-in: one that a newer release wrote must not hide the others.

    The stand-in is that of a rejected submission: a training file without a digest.
    """
    try:
        return JobSpec.model_validate(row.spec)
    except ValidationError:
        missing = FileRef(id="", filename="", path="", sha256="", bytes=0)
        return JobSpec(
            tenant=row.tenant,
            base=BaseRef(name="unknown", path="", digest=""),
            training_files=(missing,),
            config={},
            shard_bytes=1,
        )


def run_view(row: Row[Any], attempts: Iterable[Row[Any]]) -> Run:
    return Run(
        id=row.id,
        job_id=row.job_id,
        stage=Stage(row.stage),
        step=Step(row.step),
        shard=row.shard,
        state=RunState(row.state),
        fence=row.fence,
        attempts_without_progress=row.attempts,
        progress=row.progress or {},
        attempts=tuple(attempt_view(attempt) for attempt in attempts),
    )


def attempt_view(row: Row[Any]) -> Attempt:
    return Attempt(
        number=row.number,
        fence=row.fence,
        worker=row.worker,
        host=row.host,
        pid=row.pid,
        queue_wait_seconds=max(0.0, row.claimed_at - row.ready_at),
        run_seconds=None if row.ended_at is None else max(0.0, row.ended_at - row.claimed_at),
        outcome=AttemptOutcome(row.outcome) if row.outcome else None,
        error=row.error,
        cached=row.cached,
    )


def output_view(row: Row[Any]) -> RunOutput:
    return RunOutput(
        stage=Stage(row.stage),
        step=Step(row.step),
        shard=row.shard,
        artifact=ArtifactRef.model_validate(row.artifact) if row.artifact else None,
        summary=row.summary or {},
    )


def event_view(row: Row[Any]) -> Event:
    return Event(
        seq=row.seq,
        job_id=row.job_id,
        run_id=row.run_id,
        created_at=row.created_at,
        level=row.level,
        kind=row.kind,
        message=row.message,
        data=row.data or {},
    )


def file_view(row: Row[Any]) -> StoredFile:
    return StoredFile(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        purpose=row.purpose,
        path=row.path,
        sha256=row.sha256,
        bytes=row.bytes,
        created_at=row.created_at,
    )


def worker_view(
    row: Row[Any], *, now: float, lost_after_seconds: float, holds: Iterable[str]
) -> Worker:
    age = max(0.0, now - row.heartbeat_at)
    lost = row.state != "stopped" and age > lost_after_seconds
    return Worker(
        id=row.id,
        role=row.role,
        host=row.host,
        pid=row.pid,
        state="lost" if lost else row.state,
        version=row.version,
        started_at=row.started_at,
        heartbeat_at=row.heartbeat_at,
        heartbeat_age_seconds=age,
        metrics_port=row.metrics_port,
        slots=row.slots,
        holds=tuple(holds),
        info=row.info or {},
    )
