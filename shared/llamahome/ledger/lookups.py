"""Jobs as they are looked up: one, a page of them, and what belongs to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection, Row

from llamahome.errors import NotFound
from llamahome.ledger.fairness import claim_order
from llamahome.ledger.pipeline import in_order
from llamahome.ledger.rows import event_view, job_view, output_view, run_view
from llamahome.ledger.storable import is_storable
from llamahome.ledger.tables import attempt, checkpoint, event, job, run
from llamahome.ledger.transitions import Transitions
from llamahome.schemas import (
    TERMINAL_JOB_STATES,
    CheckpointRef,
    Event,
    Job,
    JobState,
    Run,
    RunOutput,
    RunState,
    Stage,
)


class Lookups(Transitions):
    """The questions about jobs. Every one raises Unavailable."""

    def job(self, job_id: str, tenant: str | None = None) -> Job:
        """One job, with its place in the training queue while it waits there.

        Raises NotFound; another tenant's job is not found either.
        """

        def work(connection: Connection) -> Job:
            view = job_view(self._visible(connection, job_id, tenant))
            if view.state is JobState.queued:
                place = self._queue_position(connection, job_id)
                return view.model_copy(update={"queue_position": place})
            return view

        return self._read(work)

    def _visible(self, connection: Connection, job_id: str, tenant: str | None) -> Row[Any]:
        row = connection.execute(sa.select(job).where(job.c.id == job_id)).one_or_none()
        if row is None or (tenant is not None and row.tenant != tenant):
            raise NotFound(
                f"Could not find fine tune: {job_id}", code="fine_tune_not_found",
                remedy="`llamahome jobs` lists the jobs there are",
            )  # fmt: skip
        return row

    def _queue_position(self, connection: Connection, job_id: str) -> int | None:
        """1 is next. Counted over the training runs that are ready, in claim order."""
        waiting = connection.execute(
            sa.select(run.c.job_id)
            .where(run.c.stage == Stage.training, run.c.state == RunState.ready)
            .order_by(*claim_order(Stage.training))
        ).scalars()
        return next((n for n, waiting_id in enumerate(waiting, 1) if waiting_id == job_id), None)

    def job_by_submission(self, tenant: str, submission_id: str) -> Job | None:
        row = self._read(lambda connection: self._by_submission(connection, tenant, submission_id))
        return job_view(row) if row is not None else None

    def _by_submission(
        self, connection: Connection, tenant: str, submission_id: str
    ) -> Row[Any] | None:
        return connection.execute(
            sa.select(job).where(job.c.tenant == tenant, job.c.submission_id == submission_id)
        ).one_or_none()

    def jobs(
        self,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
        submission_id: str | None = None,
    ) -> tuple[list[Job], bool]:
        """A page, newest first, and whether there is more. ``after`` is the last page's last id."""

        def work(connection: Connection) -> tuple[list[Job], bool]:
            query = sa.select(job).order_by(job.c.created_at.desc(), job.c.id.desc())
            if tenant is not None:
                query = query.where(job.c.tenant == tenant)
            if submission_id is not None:
                query = query.where(job.c.submission_id == submission_id)
            for key, value in (metadata or {}).items():
                query = query.where(self._has_metadata(key, value))
            if without_metadata:
                query = query.where(sa.cast(job.c.metadata, sa.Text) == "{}")
            if after is not None:
                last = self._visible(connection, after, tenant)
                query = query.where(
                    sa.tuple_(job.c.created_at, job.c.id) < sa.tuple_(last.created_at, last.id)
                )
            rows = connection.execute(query.limit(limit + 1)).all()
            return [job_view(row) for row in rows[:limit]], len(rows) > limit

        return self._read(work)

    def _has_metadata(self, key: str, value: str) -> sa.ColumnElement[bool]:
        """By key and value, not by a JSON path: SQLite's paths cannot name every key."""
        if not (is_storable(key) and is_storable(value)):
            return sa.false()
        if not self.sqlite:
            return sa.cast(job.c.metadata, postgresql.JSONB).contains({key: value})
        pairs = sa.func.json_each(job.c.metadata).table_valued("key", "value")
        return sa.exists().where(pairs.c.key == key, pairs.c.value == value)

    def active_jobs(self, tenant: str) -> int:
        """How many of the tenant's jobs have not ended."""
        return self._read(lambda connection: self._active_jobs(connection, tenant))

    def _active_jobs(self, connection: Connection, tenant: str) -> int:
        query = sa.select(sa.func.count()).where(
            job.c.tenant == tenant, job.c.state.not_in(TERMINAL_JOB_STATES)
        )
        return int(connection.execute(query).scalar_one())

    def runs(self, job_id: str) -> list[Run]:
        """The job's runs in pipeline order, each with its attempts."""

        def work(connection: Connection) -> list[Run]:
            rows = connection.execute(sa.select(run).where(run.c.job_id == job_id)).all()
            tries: dict[str, list[Row[Any]]] = {}
            of_job = sa.select(run.c.id).where(run.c.job_id == job_id)
            for row in connection.execute(
                sa.select(attempt).where(attempt.c.run_id.in_(of_job)).order_by(attempt.c.fence)
            ):
                tries.setdefault(row.run_id, []).append(row)
            return [run_view(row, tries.get(row.id, ())) for row in rows]

        return in_order(self._read(work))

    def outputs(self, job_id: str) -> list[RunOutput]:
        """What the job's finished runs have handed on, in pipeline order."""
        query = sa.select(run).where(run.c.job_id == job_id, run.c.state == RunState.done)
        rows = self._read(lambda connection: connection.execute(query).all())
        return in_order(output_view(row) for row in rows)

    def events(
        self,
        job_id: str,
        *,
        after: int | None = None,
        limit: int = 1000,
        newest_first: bool = False,
    ) -> tuple[list[Event], bool]:
        """A page of the job's events and whether there is more; ``after`` is a seq, exclusive."""
        query = sa.select(event).where(event.c.job_id == job_id)
        if after is not None:
            query = query.where(event.c.seq < after if newest_first else event.c.seq > after)
        query = query.order_by(event.c.seq.desc() if newest_first else event.c.seq)
        rows = self._read(lambda connection: connection.execute(query.limit(limit + 1)).all())
        return [event_view(row) for row in rows[:limit]], len(rows) > limit

    def checkpoints(self, job_id: str) -> list[tuple[float, CheckpointRef]]:
        """(created_at, checkpoint) of every accepted checkpoint, oldest first."""
        query = (
            sa.select(checkpoint)
            .where(checkpoint.c.job_id == job_id)
            .order_by(checkpoint.c.created_at, checkpoint.c.step)
        )
        rows = self._read(lambda connection: connection.execute(query).all())
        return [(row.created_at, CheckpointRef.model_validate(row.ref)) for row in rows]
