"""What becomes of a run whose attempt failed, or whose worker is gone.

An attempt without progress counts against ``max_attempts``; when none is left the run is parked and
its job fails. An attempt that ended because something did not answer says nothing about the job: it
does not count, until nothing has answered for :data:`OUTAGE_SECONDS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from llamahome.errors import LlamaHomeError, Unavailable, UserError, WorkerLost
from llamahome.ledger.jobs import Jobs, job_error
from llamahome.ledger.tables import attempt, checkpoint, run
from llamahome.schemas import AttemptOutcome, JobError, JobState, NewEvent, RunState

BACKOFF_FACTOR = 4.0
MAX_BACKOFF_SECONDS = 60.0
# Long enough for a database's failover or a full disk to be mended, short enough that a job that
# can never be done ends on the day it was sent.
OUTAGE_SECONDS = 3600.0


class _Outage(NamedTuple):
    """How many attempts in a row, and for how long, have found something unavailable."""

    attempts: int
    seconds: float


class Failing(Jobs):
    """The statements that end an attempt in failure."""

    def _record_failure(
        self, connection: Connection, held: Row[Any], error: LlamaHomeError, retry_seconds: float
    ) -> RunState:
        """Decide what follows from the attempt's error and write it; returns the run's state."""
        if isinstance(error, UserError):
            return self._fail_run(connection, held, error, RunState.failed)
        if isinstance(error, Unavailable):
            outage = self._outage(connection, held)
            if outage.seconds < OUTAGE_SECONDS:
                wait = _backoff(retry_seconds, outage.attempts)
                return self._try_again(connection, held, error, wait, counted=False)
        if held.attempts >= held.max_attempts:
            return self._fail_run(connection, held, error, RunState.parked)
        wait = _backoff(retry_seconds, max(0, held.attempts - 1))
        return self._try_again(connection, held, error, wait)

    def _outage(self, connection: Connection, held: Row[Any]) -> _Outage:
        """The unbroken row of such attempts before this one, since the run's last checkpoint."""
        last_progress = (
            sa.select(sa.func.max(checkpoint.c.fence))
            .where(checkpoint.c.run_id == held.id)
            .scalar_subquery()
        )
        earlier = connection.execute(
            sa.select(attempt.c.outcome, attempt.c.error, self.now - attempt.c.ended_at)
            .where(attempt.c.run_id == held.id, attempt.c.fence < held.fence)
            .where(attempt.c.fence >= sa.func.coalesce(last_progress, 0))
            .order_by(attempt.c.fence.desc())
        )
        outage = _Outage(0, 0.0)
        for outcome, error, seconds_ago in earlier:
            if outcome == AttemptOutcome.released:
                continue
            if outcome != AttemptOutcome.retried or error["kind"] != Unavailable.__name__:
                break
            outage = _Outage(outage.attempts + 1, seconds_ago)
        return outage

    def _try_again(
        self,
        connection: Connection,
        held: Row[Any],
        error: LlamaHomeError,
        wait: float,
        *,
        counted: bool = True,
    ) -> RunState:
        """The run is ready after ``wait`` seconds, or held while its job is paused."""
        state = _waiting_state(self._locked_owner(connection, held))
        connection.execute(
            sa.update(run)
            .where(run.c.id == held.id)
            .values(
                state=state, last_error=error.to_dict(), owner=None, lease_until=None,
                ready_at=self.now, rung_at=None, not_before=self.now + wait,
                attempts=held.attempts if counted else max(0, held.attempts - 1),
            )
        )  # fmt: skip
        self._end_attempt(connection, held.id, held.fence, AttemptOutcome.retried, error=error)
        again = NewEvent(message=f"Will be tried again: {error}", level="warn")
        self._append(connection, held.job_id, [again])
        self._advance(connection, held.job_id)
        return state

    def _locked_owner(self, connection: Connection, held: Row[Any]) -> Row[Any]:
        owner = self._lock_job(connection, held.job_id)
        assert owner is not None, f"run {held.id} has no job"
        return owner

    def _fail_run(
        self, connection: Connection, held: Row[Any], error: LlamaHomeError, state: RunState
    ) -> RunState:
        """End the run as failed or parked, and its job with it."""
        connection.execute(
            sa.update(run)
            .where(run.c.id == held.id)
            .values(state=state, last_error=error.to_dict(), owner=None, lease_until=None)
        )
        self._end_attempt(connection, held.id, held.fence, AttemptOutcome.failed, error=error)
        owner = self._locked_owner(connection, held)
        reported = job_error(error)
        if state is RunState.parked and error.code not in ("worker_lost", "internal_error"):
            known = {"code": "internal_error", "message": f"{error.code}: {reported.message}"}
            reported = reported.model_copy(update=known)
        self._finish_job(connection, owner, JobState.failed, reported)
        self._append(connection, owner.id, [NewEvent(message=str(error), level="error")])
        return state

    def _expire(self, connection: Connection, stage: str | None = None) -> list[str]:
        """Take back runs whose lease has run out; park those that have no attempt left.

        Returns the ids of the runs taken back.
        """
        overdue = sa.select(run).where(
            run.c.state == RunState.running, run.c.lease_until < self.now
        )
        if stage is not None:
            overdue = overdue.where(run.c.stage == stage)
        if not self.sqlite:
            overdue = overdue.with_for_update(skip_locked=True)
        taken = []
        for row in connection.execute(overdue).all():
            self._take_back(connection, row)
            taken.append(row.id)
        return taken

    def _take_back(self, connection: Connection, row: Row[Any]) -> None:
        error = WorkerLost(
            f"{row.owner} stopped renewing its lease on {row.stage} {row.step} {row.shard}"
        )
        owner = self._locked_owner(connection, row)
        parked = row.attempts >= row.max_attempts
        changed = connection.execute(
            sa.update(run)
            .where(run.c.id == row.id, run.c.state == RunState.running)
            .values(
                state=RunState.parked if parked else _waiting_state(owner),
                last_error=error.to_dict(),
                owner=None,
                lease_until=None,
                ready_at=self.now,
                rung_at=None,
                not_before=None,
            )
        )
        if changed.rowcount == 0:
            return  # its job has just ended with another run that was lost
        self._end_attempt(connection, row.id, row.fence, AttemptOutcome.lost, error=error)
        if parked:
            message = f"{error}, {row.attempts} times without progress"
            self._finish_job(
                connection, owner, JobState.failed, JobError(code="worker_lost", message=message)
            )
        self._append(
            connection,
            row.job_id,
            [NewEvent(message=str(error), level="error" if parked else "warn")],
        )
        self._advance(connection, row.job_id)


def _waiting_state(owner: Row[Any]) -> RunState:
    """What a run is that nobody works on: a paused job's is not for anybody to claim."""
    return RunState.blocked if owner.pause_requested else RunState.ready


def _backoff(first_seconds: float, failures: int) -> float:
    """Seconds to wait after so many earlier failures: 1, 4, 16, 60, 60, ... times the first."""
    return min(first_seconds * BACKOFF_FACTOR**failures, MAX_BACKOFF_SECONDS)
