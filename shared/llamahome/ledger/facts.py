"""Numbers for the exporter and the operator, read from the rows themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llamahome.ledger.backend import Backend
from llamahome.ledger.tables import attempt, job, run
from llamahome.schemas import JobState, RunState, Stage


class FleetFacts(NamedTuple):
    """One consistent reading. Keys are label values; times are Unix seconds."""

    jobs: dict[str, int]
    submitted: dict[str, int]
    finished: dict[tuple[str, str], int]
    runs_ready: dict[str, int]
    runs_unrung: dict[str, int]
    oldest_ready_at: dict[str, float]
    leases_expired: dict[str, int]
    attempts: dict[tuple[str, str], int]


class Facts(Backend):
    """The durable counts. They equal the records because they are counted from them."""

    def facts(self, *, unrung_seconds: float) -> FleetFacts:
        """Count now. A ready run counts as unrung when no doorbell was tried for that long."""

        def work(connection: Connection) -> FleetFacts:
            by_state = _counts(
                connection, sa.select(job.c.state, sa.func.count()).group_by("state")
            )
            return FleetFacts(
                jobs={state: by_state.get(state, 0) for state in JobState},
                submitted=_counts(
                    connection, sa.select(job.c.kind, sa.func.count()).group_by(job.c.kind)
                ),
                finished=self._finished(connection),
                runs_ready=self._ready(connection, sa.true()),
                runs_unrung=self._ready(connection, self._unrung(unrung_seconds)),
                oldest_ready_at=self._oldest_ready_at(connection),
                leases_expired=self._leases_expired(connection),
                attempts=self._attempts(connection),
            )

        return self._read(work)

    def _finished(self, connection: Connection) -> dict[tuple[str, str], int]:
        reason = sa.func.coalesce(job.c.error["code"].as_string(), "").label("reason")
        query = (
            sa.select(job.c.state, reason, sa.func.count())
            .where(job.c.finished_at.is_not(None))
            .group_by(job.c.state, reason)
        )
        return {(state, code): n for state, code, n in connection.execute(query)}

    def _ready(self, connection: Connection, condition: sa.ColumnElement[bool]) -> dict[str, int]:
        query = (
            sa.select(run.c.stage, sa.func.count())
            .where(run.c.state == RunState.ready, condition)
            .group_by(run.c.stage)
        )
        found = _counts(connection, query)
        return {stage: found.get(stage, 0) for stage in Stage}

    def _oldest_ready_at(self, connection: Connection) -> dict[str, float]:
        query = (
            sa.select(run.c.stage, sa.func.min(run.c.ready_at))
            .where(run.c.state == RunState.ready)
            .group_by(run.c.stage)
        )
        return {str(stage): float(since) for stage, since in connection.execute(query)}

    def _unrung(self, seconds: float) -> sa.ColumnElement[bool]:
        last = sa.func.coalesce(run.c.rung_at, run.c.ready_at)
        waiting = sa.or_(run.c.not_before.is_(None), run.c.not_before <= self.now)
        return sa.and_(waiting, last < self.now - seconds)

    def _leases_expired(self, connection: Connection) -> dict[str, int]:
        query = (
            sa.select(run.c.stage, sa.func.count())
            .where(run.c.state == RunState.running, run.c.lease_until < self.now)
            .group_by(run.c.stage)
        )
        found = _counts(connection, query)
        return {stage: found.get(stage, 0) for stage in Stage}

    def _attempts(self, connection: Connection) -> dict[tuple[str, str], int]:
        query = (
            sa.select(attempt.c.stage, attempt.c.outcome, sa.func.count())
            .where(attempt.c.outcome.is_not(None))
            .group_by(attempt.c.stage, attempt.c.outcome)
        )
        return {(stage, outcome): n for stage, outcome, n in connection.execute(query)}


def _counts(connection: Connection, query: sa.Select[Any]) -> dict[str, int]:
    return {str(label): int(n) for label, n in connection.execute(query)}
