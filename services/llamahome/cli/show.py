"""`llamahome show JOB`: the facts of a job, every attempt of every run, and what it proves."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llamahome.cli.context import command_line
from llamahome.cli.output import MISSING, duration, facts, number, put, put_table
from llamahome.cli.progress import elapsed, headline
from llamahome.client import JobInfo
from llamahome.schemas import JobReport, JobState, Run

RUN_COLUMNS = (
    "STAGE", "STEP", "SHARD", "STATE", "WORKER", "HOST", "ATTEMPT", "QUEUE WAIT", "RUN TIME",
    "OUTCOME",
)  # fmt: skip


def show(
    job: JobInfo, runs: Sequence[Run], report: JobReport | None, *, state: Path | None
) -> None:
    """Print all of it on stdout; ``state`` is the folder named, for the commands suggested."""
    facts(_job_facts(job, runs))
    put("")
    put_table(RUN_COLUMNS, run_rows(runs), stream=sys.stdout)
    errors = [line for run in runs for line in _attempt_errors(run)]
    if errors:
        put("")
        for line in errors:
            put(line)
    if report is not None:
        put("")
        facts(_report_facts(report))
    put("")
    facts(further(job, state))


def run_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row an attempt, in RUN_COLUMNS; a run that was never tried has one row too."""
    rows = []
    for run in runs:
        place = [run.stage.value, run.step.value, str(run.shard), run.state.value]
        for attempt in run.attempts:
            outcome = attempt.outcome.value if attempt.outcome else MISSING
            rows.append(
                [
                    *place, f"{attempt.worker}", attempt.host, str(attempt.number),
                    duration(attempt.queue_wait_seconds), duration(attempt.run_seconds),
                    f"{outcome} (cached)" if attempt.cached else outcome,
                ]
            )  # fmt: skip
        if not run.attempts:
            rows.append([*place, *[MISSING] * (len(RUN_COLUMNS) - len(place))])
    return rows


def further(job: JobInfo, state: Path | None) -> list[tuple[str, str]]:
    """Where to look next, by how the job stands."""

    def line(words: str) -> str:
        return command_line(words, state)

    if not job.terminal:
        return [("watch it", line(f"watch {job.id}")), ("end it", line(f"cancel {job.id}"))]
    if job.state is JobState.succeeded:
        return [
            ("adapter", line(f"fetch {job.id} DIR")),
            ("report", f"report.json there, or {line(f'show {job.id} --json')}"),
        ]
    return [
        ("again", f"{line(f'retry {job.id}')}, a new job that reuses what was finished"),
        ("fleet", f"{line('ps')}, {line('doctor')}, and DIR/logs of `llamahome up`"),
    ]


def _job_facts(job: JobInfo, runs: Sequence[Run]) -> list[tuple[str, str]]:
    now = headline(job, runs)
    pairs = [
        ("job", job.id),
        ("state", f"{job.state.value}{': ' if now else ''}{now}"),
        ("base", job.model),
        ("accepted", _moment(job.created_at)),
        ("started", _moment(job.started_at)),
        ("finished", f"{_moment(job.finished_at)}{_took(job)}"),
        ("model", job.fine_tuned_model),
        ("retry of", job.retry_of),
        ("submission", job.submission_id),
        ("metadata", " ".join(f"{k}={v}" for k, v in (job.metadata or {}).items())),
        ("files", " ".join(filter(None, (job.training_file, job.validation_file)))),
    ]
    return [(name, value) for name, value in pairs if value and value != MISSING]


def _moment(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at)) if at else MISSING


def _took(job: JobInfo) -> str:
    seconds = elapsed(job)
    return "" if seconds is None else f", {duration(seconds)} after it was accepted"


def _attempt_errors(run: Run) -> list[str]:
    return [
        f"{run.stage.value} {run.step.value} {run.shard}, attempt {attempt.number}: "
        f"{attempt.error.get('code', 'error')}: {attempt.error.get('message', attempt.error)}"
        for attempt in run.attempts
        if attempt.error
    ]


def _report_facts(report: JobReport) -> list[tuple[str, str]]:
    rows, prepared, trained = report.validation, report.preparation, report.training
    moved = "the adapter moved" if trained.adapter_moved else "THE ADAPTER DID NOT MOVE"
    kept = "the base is unchanged" if trained.base_unchanged else "THE BASE CHANGED"
    best = trained.best_step
    pairs = [
        ("rows", f"{rows.total:,}: {rows.valid:,} valid{_by_reason(rows.invalid)}, "
                 f"{rows.duplicates:,} duplicates, {rows.leaked:,} leaked into validation"),
        ("prepared", f"{prepared.training.rows:,} training rows "
                     f"({prepared.training.trained_tokens:,} of {prepared.training.tokens:,} "
                     f"tokens trained), {prepared.validation.rows:,} validation rows"
                     f"{_by_reason(prepared.dropped)}, {prepared.truncated_rows:,} truncated"),
        ("stop token", f"trained in {number(prepared.stop_token_trained_share)} of the rows"),
        ("validation loss", f"{number(trained.eval_loss_before)} -> "
                            f"{number(trained.eval_loss_after)}"
                            + (f", best {number(trained.best_eval_loss)} at step {best}"
                               if best is not None else "")),
        ("trained", f"{trained.steps:,} steps, {trained.epochs} epochs, "
                    f"{trained.trained_tokens:,} tokens, {trained.trainable_parameters:,} "
                    f"parameters, {trained.precision}, {trained.mode}"),
        ("checked", f"{kept}, {moved}"),
        ("stopped early", trained.stopped_early or ""),
        ("resumed from", " ".join(f"step {step}" for step in trained.resumed_from)),
    ]  # fmt: skip
    return [(name, value) for name, value in pairs if value]


def _by_reason(counts: dict[str, int]) -> str:
    return "".join(f", {count:,} {reason}" for reason, count in sorted(counts.items()))
