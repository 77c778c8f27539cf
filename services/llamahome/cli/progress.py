"""How far a job is, in words: the same ones for `watch`, `show`, `jobs` and `demo`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llamahome.cli.output import MISSING, duration, number, share
from llamahome.client import EventInfo, JobInfo
from llamahome.schemas import JobState, JsonObject, Run, RunState, Stage, Step

STAGE_COLUMNS = ("STAGE", "STATE", "DONE", "WORKERS", "LONGEST WAIT", "RUN TIME")
_SHOWN_FIRST = (RunState.failed, RunState.parked, RunState.cancelled, RunState.running)


def stage_rows(job: JobInfo, runs: Sequence[Run]) -> list[list[str]]:
    """One row a stage, in the columns of STAGE_COLUMNS."""
    rows = []
    for stage in Stage:
        own = [run for run in runs if run.stage is stage]
        attempts = [attempt for run in own for attempt in run.attempts]
        waits = [attempt.queue_wait_seconds for attempt in attempts]
        spent = [attempt.run_seconds for attempt in attempts if attempt.run_seconds is not None]
        rows.append(
            [
                stage.value,
                stage_state(own),
                _stage_done(job, stage, own),
                str(len({(attempt.host, attempt.pid) for attempt in attempts}) or MISSING),
                duration(max(waits)) if waits else MISSING,
                duration(sum(spent)) if spent else MISSING,
            ]
        )
    return rows


def stage_state(runs: Sequence[Run]) -> str:
    """One word for the runs of one stage; the worst of them wins."""
    states = {run.state for run in runs}
    for state in _SHOWN_FIRST:
        if state in states:
            return state.value
    if states == {RunState.done}:
        return "done"
    if RunState.done in states:
        return "running"  # between two shards
    return "ready" if RunState.ready in states else "waiting"


def _stage_done(job: JobInfo, stage: Stage, runs: Sequence[Run]) -> str:
    if stage is Stage.training:
        steps = job.progress if job.progress and job.progress.stage is stage else None
        return f"step {steps.done}/{steps.total or '?'}" if steps else MISSING
    shards = [run for run in runs if run.step is Step.shard]
    done = sum(run.state is RunState.done for run in shards)
    return f"{done}/{len(shards)} shards" if shards else MISSING


class Eta:
    """Seconds left, by the pace between the first step that was seen done and the newest."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._newest: tuple[float, int] | None = None

    def left(self, job: JobInfo, now: float) -> float | None:
        """None until there is a pace to judge by. ``now`` is monotonic seconds."""
        progress = job.progress
        if progress is None or progress.stage is not Stage.training or not progress.total:
            return None
        if self._newest is None or progress.done != self._newest[1]:
            self._newest = (now, progress.done)
        went_back = self._first is not None and progress.done < self._first[1]  # to a checkpoint
        # Not from step 0: loading the base and the first evaluation are no steps.
        if self._first is None or self._first[1] == 0 or went_back:
            self._first = self._newest
        steps = self._newest[1] - self._first[1]
        if not steps:
            return None
        pace = (self._newest[0] - self._first[0]) / steps
        return max(0.0, (progress.total - progress.done) * pace - (now - self._newest[0]))


def training_line(job: JobInfo, seconds_left: float | None = None) -> str | None:
    """``step 12/120 (10 %)  loss 2.31  ...``; None while the job does not train."""
    progress = job.progress
    if progress is None or progress.stage is not Stage.training or progress.total is None:
        return None
    data: JsonObject = progress.data
    shown = [
        f"step {progress.done}/{progress.total} ({share(progress.done, progress.total)})",
        f"loss {number(data.get('loss', data.get('train_loss')))}",
        f"eval loss {number(data.get('eval_loss'))}",
        f"lr {number(data.get('learning_rate'), 3)}",
        f"grad norm {number(data.get('grad_norm'), 3)}",
        f"{number(data.get('tokens_per_second'), 4)} tok/s",
        f"ETA {duration(seconds_left)}",
    ]
    return "  ".join(shown)


def headline(job: JobInfo, runs: Sequence[Run] = (), seconds_left: float | None = None) -> str:
    """What the job does now, in one line."""
    if job.state in (JobState.validating, JobState.preparing):
        stage = Stage.validation if job.state is JobState.validating else Stage.preprocessing
        own = [run for run in runs if run.stage is stage]
        return f"{stage.value} {_stage_done(job, stage, own)}" if own else stage.value
    if job.state is JobState.queued:
        place = f", place {job.queue_position} in the queue" if job.queue_position else ""
        return f"waits for a training worker{place}"
    if job.state in (JobState.running, JobState.paused):
        return training_line(job, seconds_left) or "starts"
    if job.error is not None:
        return f"{job.error.code}: {job.error.message}"
    if job.state is JobState.succeeded:
        return f"{job.fine_tuned_model} in {duration(elapsed(job))}"
    return ""


def elapsed(job: JobInfo) -> float | None:
    """Seconds from acceptance to the end; None while the job goes on."""
    return None if job.finished_at is None else max(0, job.finished_at - job.created_at)


def percent(job: JobInfo) -> str:
    """The current stage's share done; all of it once the job has succeeded."""
    if job.state is JobState.succeeded:
        return "100 %"
    return share(job.progress.done, job.progress.total) if job.progress else MISSING


def worth_telling(event: EventInfo) -> bool:
    """Whether the progress line does not say it already, as it does each step's metrics."""
    data = event.data or {}
    return event.type != "metrics" or "eval_loss" in data


def event_line(event: EventInfo) -> str:
    """``12:03:07  message``, local time; warnings and errors say so."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    level = "" if event.level == "info" else f"{event.level}: "
    return f"{clock}  {level}{event.message}"
