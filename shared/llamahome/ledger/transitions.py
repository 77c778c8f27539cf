"""Moves shared by every transaction that changes a job: advance, finish, append an event.

All take an open writing connection and leave committing to the caller, so that a state, its
event and what follows from it are one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from llamahome.errors import LlamaHomeError
from llamahome.ledger import pipeline
from llamahome.ledger.backend import Backend, new_id
from llamahome.ledger.storable import storable
from llamahome.ledger.tables import attempt, event, job, run, share
from llamahome.schemas import (
    AttemptOutcome,
    JobError,
    JobState,
    NewEvent,
    RunState,
    Stage,
    Step,
)

_OPEN_RUNS = (RunState.blocked, RunState.ready, RunState.running)
_MESSAGES = {
    JobState.validating: "Validating training file",
    JobState.preparing: "Files validated, preparing tokens",
    JobState.queued: "Tokens prepared, moving job to queued state",
}


class Advanced(NamedTuple):
    """Where a job stands after a transaction, and how many runs of a stage it made ready."""

    state: JobState
    stage: Stage | None = None
    ready: int = 0


class Transitions(Backend):
    """What the job, run and sweeper statements have in common."""

    def _lock_job(self, connection: Connection, job_id: str) -> Row[Any] | None:
        """The job's row, locked until the transaction ends (SQLite's write lock covers it)."""
        query = sa.select(job).where(job.c.id == job_id)
        return connection.execute(query if self.sqlite else query.with_for_update()).one_or_none()

    def _append(
        self,
        connection: Connection,
        job_id: str,
        events: Iterable[NewEvent],
        *,
        run_id: str | None = None,
        fence: int | None = None,
    ) -> None:
        rows = [
            {
                "job_id": job_id, "run_id": run_id, "fence": fence, "level": new.level,
                "kind": new.kind, "message": storable(new.message), "data": new.data,
            }
            for new in events
        ]  # fmt: skip
        if rows:
            connection.execute(sa.insert(event).values(created_at=self.now), rows)

    def _insert_runs(
        self,
        connection: Connection,
        owner: Row[Any],
        runs: Iterable[pipeline.NewRun],
        max_attempts: int,
    ) -> None:
        rows = [
            {
                "id": new_id("run-"), "job_id": owner.id, "tenant": owner.tenant,
                "base": owner.spec["base"]["name"], "priority": 0, "stage": new.stage,
                "step": new.step, "shard": new.shard, "state": RunState.blocked, "fence": 0,
                "attempts": 0, "max_attempts": max_attempts, "plan": new.plan,
            }
            for new in runs
        ]  # fmt: skip
        if rows:
            connection.execute(sa.insert(run).values(created_at=self.now), rows)

    def _advance(self, connection: Connection, job_id: str) -> Advanced:
        """Re-derive the frontier from the rows: make its blocked runs ready, name the job's state.

        The caller holds the job's lock. A paused job's runs stay blocked.
        """
        owner = self._lock_job(connection, job_id)
        assert owner is not None, f"job {job_id} vanished inside its own transaction"
        state = JobState(owner.state)
        if state.terminal:
            return Advanced(state)
        places = [
            pipeline.RunPlace(Stage(row.stage), Step(row.step), RunState(row.state))
            for row in connection.execute(
                sa.select(run.c.stage, run.c.step, run.c.state).where(run.c.job_id == job_id)
            )
        ]
        place = pipeline.frontier(places)
        active = any((p.stage, p.step) == place and p.state is RunState.running for p in places)
        ahead = any(p.state is RunState.ready and (p.stage, p.step) != place for p in places)
        if ahead and place is not None:
            self._hold_back(connection, job_id, place)
        if owner.pause_requested and place is not None:
            held = JobState.running if active and place[0] is Stage.training else JobState.paused
            self._set_job_state(connection, owner, held)
            return Advanced(held)
        ready = 0 if place is None else self._make_ready(connection, job_id, place)
        new = pipeline.job_state(place, active=active, started=owner.started_at is not None)
        self._set_job_state(connection, owner, new)
        return Advanced(new, None if place is None else place[0], ready)

    def _hold_back(self, connection: Connection, job_id: str, place: tuple[Stage, Step]) -> None:
        """An earlier run is to be done again: what was ready beyond it would lack an input."""
        stage, step = place
        connection.execute(
            sa.update(run)
            .where(run.c.job_id == job_id, run.c.state == RunState.ready)
            .where(sa.or_(run.c.stage != stage, run.c.step != step))
            .values(state=RunState.blocked)
        )

    def _make_ready(self, connection: Connection, job_id: str, place: tuple[Stage, Step]) -> int:
        """Ready, and counted as rung: whoever made them so rings after the commit.

        Where that doorbell is lost, the sweeper rings ``rering_seconds`` later.
        """
        stage, step = place
        return connection.execute(
            sa.update(run)
            .where(run.c.job_id == job_id, run.c.stage == stage, run.c.step == step)
            .where(run.c.state == RunState.blocked)
            .values(state=RunState.ready, ready_at=self.now, rung_at=self.now, not_before=None)
        ).rowcount

    def _set_job_state(self, connection: Connection, owner: Row[Any], state: JobState) -> None:
        if owner.state == state:
            return
        values: dict[str, Any] = {"state": state}
        if state.terminal:
            values["finished_at"] = self.now
        connection.execute(sa.update(job).where(job.c.id == owner.id).values(**values))
        if state in _MESSAGES:
            self._append(connection, owner.id, [NewEvent(message=_MESSAGES[state])])

    def _finish_job(
        self, connection: Connection, owner: Row[Any], state: JobState, error: JobError | None
    ) -> None:
        """End the job as failed or cancelled; runs that have not ended are cancelled with it."""
        connection.execute(
            sa.update(job)
            .where(job.c.id == owner.id)
            .values(state=state, finished_at=self.now, error=error.model_dump() if error else None)
        )
        # The runs first: that waits for a claim under way, whose attempt is there to be ended then.
        of_job = run.c.job_id == owner.id
        connection.execute(
            sa.update(run)
            .where(of_job, run.c.state.in_(_OPEN_RUNS))
            .values(state=RunState.cancelled, lease_until=None)
        )
        cancelled = sa.select(run.c.id).where(of_job, run.c.state == RunState.cancelled)
        connection.execute(
            sa.update(attempt)
            .where(attempt.c.run_id.in_(cancelled), attempt.c.ended_at.is_(None))
            .values(ended_at=self.now, outcome=AttemptOutcome.cancelled)
        )

    def _end_attempt(
        self,
        connection: Connection,
        run_id: str,
        fence: int,
        outcome: AttemptOutcome,
        *,
        error: LlamaHomeError | None = None,
        cached: bool = False,
    ) -> None:
        """Close the attempt's row and charge its seconds to the tenant's share of the stage."""
        ended = connection.execute(
            sa.update(attempt)
            .where(attempt.c.run_id == run_id, attempt.c.fence == fence)
            .where(attempt.c.ended_at.is_(None))
            .values(
                ended_at=self.now, outcome=outcome, cached=cached,
                error=error.to_dict() if error else None,
            )
            .returning(attempt.c.stage, attempt.c.ended_at - attempt.c.claimed_at)
        ).one_or_none()  # fmt: skip
        if ended is None:
            return
        stage, seconds = ended
        tenant = connection.execute(sa.select(run.c.tenant).where(run.c.id == run_id)).scalar_one()
        self._charge(connection, stage, tenant, max(0.0, seconds))

    def _charge(self, connection: Connection, stage: str, tenant: str, seconds: float) -> None:
        """Add to the tenant's virtual time, starting it at the least of the busy tenants'."""
        mine = sa.and_(share.c.stage == stage, share.c.tenant == tenant)
        add = sa.update(share).where(mine).values(used_seconds=share.c.used_seconds + seconds)
        if connection.execute(add).rowcount:
            return
        least = self._least_busy_share(connection, stage)
        # Another completion of the tenant may insert the row meanwhile: then this one waits for it,
        # finds it there, and adds to it.
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        begun = connection.execute(
            insert(share)
            .values(stage=stage, tenant=tenant, used_seconds=least + seconds)
            .on_conflict_do_nothing()
        )
        if begun.rowcount == 0:
            connection.execute(add)

    def _least_busy_share(self, connection: Connection, stage: str) -> float:
        busy = (
            sa.select(run.c.tenant)
            .where(run.c.stage == stage, run.c.state.in_((RunState.ready, RunState.running)))
            .distinct()
        )
        least = connection.execute(
            sa.select(sa.func.min(share.c.used_seconds))
            .where(share.c.stage == stage, share.c.tenant.in_(busy))
        ).scalar_one()  # fmt: skip
        return float(least or 0.0)

    def _lift_share(self, connection: Connection, tenant: str) -> None:
        """A tenant that comes back from being idle must not spend what it saved up meanwhile."""
        for stage in Stage:
            least = self._least_busy_share(connection, stage)
            connection.execute(
                sa.update(share)
                .where(share.c.stage == stage, share.c.tenant == tenant)
                .where(share.c.used_seconds < least)
                .values(used_seconds=least)
            )
