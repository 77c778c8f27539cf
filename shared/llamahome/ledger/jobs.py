"""Jobs: accepted, looked up, cancelled, paused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError

from llamahome.errors import InvalidState, LlamaHomeError, NotFound
from llamahome.ledger import pipeline
from llamahome.ledger.backend import new_id
from llamahome.ledger.fairness import claim_order
from llamahome.ledger.pipeline import in_order
from llamahome.ledger.rows import event_view, job_view, output_view, run_view
from llamahome.ledger.tables import attempt, checkpoint, event, job, run
from llamahome.ledger.transitions import Transitions
from llamahome.schemas import (
    TERMINAL_JOB_STATES,
    CheckpointRef,
    Event,
    Job,
    JobError,
    JobSpec,
    JobState,
    NewEvent,
    Run,
    RunOutput,
    RunState,
    Stage,
)

MAX_ATTEMPTS = 3


class Jobs(Transitions):
    """The statements on whole jobs."""

    def submit(
        self,
        spec: JobSpec,
        *,
        kind: str = "http",
        submission_id: str | None = None,
        retry_of: str | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> tuple[Job, bool]:
        """Accept a job: its row, its runs and its first event in one transaction.

        Returns the job and whether it is new. The same (tenant, submission_id) answers the job
        that the first one made, whatever the second one's spec. Raises Unavailable.
        """

        def work(connection: Connection) -> tuple[str, bool]:
            if submission_id is not None:
                first = self._by_submission(connection, spec.tenant, submission_id)
                if first is not None:
                    return first.id, False
            owner = self._insert_job(
                connection, spec, kind=kind, submission_id=submission_id, retry_of=retry_of
            )
            self._lift_share(connection, spec.tenant)
            self._insert_runs(connection, owner, pipeline.first_runs(spec), max_attempts)
            self._append(
                connection, owner.id, [NewEvent(message=f"Created fine-tuning job: {owner.id}")]
            )
            self._advance(connection, owner.id)
            return owner.id, True

        return self._submitted(work, spec.tenant, submission_id)

    def reject(
        self, spec: JobSpec, error: LlamaHomeError, *, kind: str, submission_id: str
    ) -> tuple[Job, bool]:
        """Record a submission that cannot run as a failed job, so that its sender can see why."""

        def work(connection: Connection) -> tuple[str, bool]:
            first = self._by_submission(connection, spec.tenant, submission_id)
            if first is not None:
                return first.id, False
            owner = self._insert_job(
                connection, spec, kind=kind, submission_id=submission_id, retry_of=None
            )
            self._finish_job(connection, owner, JobState.failed, job_error(error))
            self._append(connection, owner.id, [NewEvent(message=str(error), level="error")])
            return owner.id, True

        return self._submitted(work, spec.tenant, submission_id)

    def _submitted(self, work: Any, tenant: str, submission_id: str | None) -> tuple[Job, bool]:
        try:
            job_id, created = self._write(work)
        except IntegrityError:
            # Two equal submissions raced on PostgreSQL and the other one won.
            first = self.job_by_submission(tenant, submission_id) if submission_id else None
            if first is None:
                raise
            return first, False
        return self.job(job_id), created

    def _insert_job(
        self,
        connection: Connection,
        spec: JobSpec,
        *,
        kind: str,
        submission_id: str | None,
        retry_of: str | None,
    ) -> Row[Any]:
        body = spec.model_dump(mode="json")
        return connection.execute(
            sa.insert(job)
            .values(
                id=new_id("ftjob-"),
                tenant=spec.tenant,
                kind=kind,
                submission_id=submission_id,
                spec=body,
                spec_hash=hashlib.sha256(spec.model_dump_json().encode()).hexdigest(),
                metadata=spec.metadata,
                state=JobState.accepted,
                cancel_requested=False,
                pause_requested=False,
                created_at=self.now,
                retry_of=retry_of,
            )
            .returning(job)
        ).one()

    def _by_submission(
        self, connection: Connection, tenant: str, submission_id: str
    ) -> Row[Any] | None:
        return connection.execute(
            sa.select(job).where(job.c.tenant == tenant, job.c.submission_id == submission_id)
        ).one_or_none()

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
        if not self.sqlite:
            return sa.cast(job.c.metadata, postgresql.JSONB).contains({key: value})
        pairs = sa.func.json_each(job.c.metadata).table_valued("key", "value")
        return sa.exists().where(pairs.c.key == key, pairs.c.value == value)

    def active_jobs(self, tenant: str) -> int:
        """How many of the tenant's jobs have not ended."""
        query = sa.select(sa.func.count()).where(
            job.c.tenant == tenant, job.c.state.not_in(TERMINAL_JOB_STATES)
        )
        return self._read(lambda connection: int(connection.execute(query).scalar_one()))

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

    def cancel(self, job_id: str, tenant: str | None = None) -> Job:
        """End the job now; whoever works on it learns so at its next renewal.

        Idempotent. Raises NotFound, and InvalidState for a job that succeeded or failed.
        """

        def work(connection: Connection) -> None:
            self._visible(connection, job_id, tenant)
            owner = self._lock_job(connection, job_id)
            assert owner is not None
            state = JobState(owner.state)
            if state is JobState.cancelled:
                return
            if state.terminal:
                raise InvalidState(f"job {job_id} has already {state}, so it cannot be cancelled")
            connection.execute(
                sa.update(job).where(job.c.id == job_id).values(cancel_requested=True)
            )
            self._finish_job(connection, owner, JobState.cancelled, None)
            self._append(connection, job_id, [NewEvent(message="The job has been cancelled")])

        self._write(work)
        return self.job(job_id)

    def pause(self, job_id: str, tenant: str | None = None) -> Job:
        """Hold the job: what waits is held now, a training saves a checkpoint first.

        Idempotent. Raises NotFound, and InvalidState for a job that has ended.
        """
        return self._hold(job_id, tenant, pause=True)

    def resume(self, job_id: str, tenant: str | None = None) -> Job:
        """Let a paused job go on from where it was. Idempotent. Raises as ``pause``."""
        return self._hold(job_id, tenant, pause=False)

    def _hold(self, job_id: str, tenant: str | None, *, pause: bool) -> Job:
        def work(connection: Connection) -> None:
            self._visible(connection, job_id, tenant)
            owner = self._lock_job(connection, job_id)
            assert owner is not None
            if JobState(owner.state).terminal:
                verb = "paused" if pause else "resumed"
                raise InvalidState(
                    f"job {job_id} has already {owner.state}, so it cannot be {verb}"
                )
            if owner.pause_requested == pause:
                return
            connection.execute(
                sa.update(job).where(job.c.id == job_id).values(pause_requested=pause)
            )
            if pause:
                connection.execute(
                    sa.update(run)
                    .where(run.c.job_id == job_id, run.c.state == RunState.ready)
                    .values(state=RunState.blocked)
                )
            message = "Pause requested" if pause else "The job has been resumed"
            self._append(connection, job_id, [NewEvent(message=message)])
            self._advance(connection, job_id)

        self._write(work)
        return self.job(job_id)


def job_error(error: LlamaHomeError) -> JobError:
    """The error as the job's owner sees it: the code, one line, and the field or file at fault."""
    return JobError(
        code=error.code, message=str(error), param=error.place.field or error.place.file
    )
