"""Jobs: accepted, cancelled, paused."""

from __future__ import annotations

import hashlib
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError

from llamahome.errors import InvalidState, LlamaHomeError, QuotaExceeded
from llamahome.ledger import pipeline
from llamahome.ledger.backend import new_id
from llamahome.ledger.lookups import Lookups
from llamahome.ledger.tables import job, run
from llamahome.schemas import Job, JobError, JobSpec, JobState, NewEvent, RunState

MAX_ATTEMPTS = 3
# First key of PostgreSQL's advisory locks on tenants; the second is the tenant's hash.
_TENANT_LOCKS = 720104262


class Jobs(Lookups):
    """The statements on whole jobs."""

    def submit(
        self,
        spec: JobSpec,
        *,
        kind: str = "http",
        submission_id: str | None = None,
        retry_of: str | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        quota: int | None = None,
    ) -> tuple[Job, bool]:
        """Accept a job: its row, its runs and its first event in one transaction.

        Returns the job and whether it is new. The same (tenant, submission_id) answers the job
        that the first one made, whatever the second one's spec. Raises QuotaExceeded where the
        tenant has ``quota`` jobs that have not ended, Unavailable.
        """

        def work(connection: Connection) -> tuple[str, bool]:
            if quota is not None:
                # First, so that of two equal submissions the second one finds the first one's job.
                self._lock_tenant(connection, spec.tenant)
            if submission_id is not None:
                first = self._by_submission(connection, spec.tenant, submission_id)
                if first is not None:
                    return first.id, False
            if quota is not None:
                self._refuse_over(connection, spec.tenant, quota)
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

    def check_quota(self, tenant: str, quota: int) -> None:
        """Raises QuotaExceeded where a job more would be refused now, Unavailable."""
        self._read(lambda connection: self._refuse_over(connection, tenant, quota))

    def _refuse_over(self, connection: Connection, tenant: str, quota: int) -> None:
        active = self._active_jobs(connection, tenant)
        if active >= quota:
            raise QuotaExceeded(
                f"{active} jobs are in flight and {quota} are allowed",
                remedy="Wait for one to end, or cancel one",
            )

    def _lock_tenant(self, connection: Connection, tenant: str) -> None:
        """One submission of a tenant at a time; SQLite's write lock does the same there."""
        if not self.sqlite:
            key = sa.func.hashtext(sa.cast(tenant, sa.Text))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_TENANT_LOCKS, key)))

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
