"""Runs: claim, renew, complete. The statements everything durable stands on.

A claim raises the run's fence and takes a lease; every later write of that attempt carries the
fence, and a stale one changes no row. Leases are for liveness, the fence is for safety
(Kleppmann 2016, "How to do distributed locking": the resource must check the token).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from llamahome.errors import Fenced, LlamaHomeError, UserError, WorkerLost
from llamahome.ledger import pipeline
from llamahome.ledger.fairness import claim_order
from llamahome.ledger.jobs import Jobs, job_error
from llamahome.ledger.rows import output_view
from llamahome.ledger.tables import artifact, attempt, checkpoint, job, run
from llamahome.ledger.transitions import Advanced
from llamahome.schemas import (
    ArtifactRef,
    AttemptOutcome,
    CheckpointRef,
    JobError,
    JobSpec,
    JobState,
    JsonObject,
    NewEvent,
    RunState,
    Stage,
    StageResult,
    StageTask,
    Step,
    StopReason,
)

BACKOFF_FACTOR = 4.0


class Claim(NamedTuple):
    """A run in somebody's hands: the task, and the lease it is held under."""

    task: StageTask
    tenant: str
    worker: str
    lease_seconds: float

    @property
    def run_id(self) -> str:
        return self.task.run_id

    @property
    def fence(self) -> int:
        return self.task.fence


class Runs(Jobs):
    """The statements on single runs."""

    def claim(
        self,
        stage: Stage,
        worker: str,
        *,
        host: str,
        pid: int,
        lease_seconds: float,
        warm_base: str | None = None,
        affinity_seconds: float = 60.0,
    ) -> Claim | None:
        """Take the best ready run of a stage, or None when there is none.

        Runs whose lease has expired are taken back first. With ``warm_base`` a run of that base
        goes before the others, unless one of them has waited longer than ``affinity_seconds``.
        Raises Unavailable.
        """

        def work(connection: Connection) -> Claim | None:
            self._expire(connection, stage)
            picked = self._pick(connection, stage, warm_base, affinity_seconds)
            if picked is None:
                return None
            taken = self._take(connection, picked, worker, lease_seconds)
            if taken is None:
                return None
            self._insert_attempt(connection, taken, picked.ready_at, worker, host, pid)
            self._note_start(connection, taken)
            return Claim(self._task(connection, taken), taken.tenant, worker, lease_seconds)

        return self._write(work)

    def _pick(
        self, connection: Connection, stage: Stage, warm_base: str | None, affinity_seconds: float
    ) -> Row[Any] | None:
        order = claim_order(stage)
        if warm_base is not None:
            waited = self.now - run.c.ready_at
            warm = sa.or_(run.c.base == warm_base, waited > affinity_seconds)
            order = (order[0], sa.case((warm, 0), else_=1), *order[1:])
        query: sa.Select[Any] = (
            sa.select(run.c.id, run.c.ready_at, run.c.fence)
            .where(run.c.stage == stage, run.c.state == RunState.ready)
            .where(sa.or_(run.c.not_before.is_(None), run.c.not_before <= self.now))
            .order_by(*order)
            .limit(1)
        )
        if not self.sqlite:
            query = query.with_for_update(of=run, skip_locked=True)
        return connection.execute(query).one_or_none()

    def _take(
        self, connection: Connection, picked: Row[Any], worker: str, lease_seconds: float
    ) -> Row[Any] | None:
        return connection.execute(
            sa.update(run)
            .where(run.c.id == picked.id, run.c.state == RunState.ready)
            .where(run.c.fence == picked.fence)
            .values(
                state=RunState.running,
                fence=run.c.fence + 1,
                attempts=run.c.attempts + 1,
                owner=worker,
                lease_until=self.now + lease_seconds,
                progress_at=self.now,
            )
            .returning(run)
        ).one_or_none()

    def _insert_attempt(
        self,
        connection: Connection,
        taken: Row[Any],
        ready_at: float,
        worker: str,
        host: str,
        pid: int,
    ) -> None:
        earlier = sa.select(sa.func.count()).where(attempt.c.run_id == taken.id).scalar_subquery()
        connection.execute(
            sa.insert(attempt).values(
                run_id=taken.id,
                fence=taken.fence,
                number=earlier + 1,
                stage=taken.stage,
                worker=worker,
                host=host,
                pid=pid,
                ready_at=ready_at,
                claimed_at=self.now,
                cached=False,
            )
        )

    def _note_start(self, connection: Connection, taken: Row[Any]) -> None:
        """The first claim starts the job; a training's claim makes it running."""
        mine = job.c.id == taken.job_id
        started = connection.execute(
            sa.update(job).where(mine, job.c.started_at.is_(None)).values(started_at=self.now)
        )
        if started.rowcount or taken.stage == Stage.training:
            self._advance(connection, taken.job_id)

    def _task(self, connection: Connection, taken: Row[Any]) -> StageTask:
        spec = connection.execute(
            sa.select(job.c.spec).where(job.c.id == taken.job_id)
        ).scalar_one()
        done = connection.execute(
            sa.select(run).where(run.c.job_id == taken.job_id, run.c.state == RunState.done)
        ).all()
        inputs = sorted(
            (output_view(row) for row in done),
            key=lambda out: (pipeline.ORDER.index((out.stage, out.step)), out.shard),
        )
        return StageTask(
            job_id=taken.job_id,
            run_id=taken.id,
            fence=taken.fence,
            stage=Stage(taken.stage),
            step=Step(taken.step),
            shard=taken.shard,
            spec=JobSpec.model_validate(spec),
            plan=taken.plan,
            inputs=tuple(inputs),
            resume=CheckpointRef.model_validate(taken.checkpoint) if taken.checkpoint else None,
        )

    def renew(
        self,
        claim: Claim,
        *,
        progress: JsonObject | None = None,
        events: Iterable[NewEvent] = (),
    ) -> StopReason | None:
        """Extend the lease, hand over progress and events, and hear why to stop, if at all.

        Answers ``cancel`` or ``fenced`` where the run is no longer this attempt's; then nothing
        of what was handed over is kept. Raises Unavailable.
        """

        def work(connection: Connection) -> StopReason | None:
            values: dict[str, Any] = {"lease_until": self.now + claim.lease_seconds}
            if progress is not None:
                values |= {"progress": progress, "progress_at": self.now}
            if not self._update_held(connection, claim, values):
                return self._lost_reason(connection, claim)
            self._append(
                connection, claim.task.job_id, events, run_id=claim.run_id, fence=claim.fence
            )
            paused = connection.execute(
                sa.select(job.c.pause_requested).where(job.c.id == claim.task.job_id)
            ).scalar_one()
            # Data shards are short: only a training stops midway for a pause.
            return StopReason.pause if paused and claim.task.stage is Stage.training else None

        return self._write(work)

    def checkpoint(self, claim: Claim, point: CheckpointRef) -> None:
        """Move the resume pointer. That is progress: attempts count from zero again.

        Raises Fenced when another attempt holds the run.
        """

        def work(connection: Connection) -> None:
            body = point.model_dump(mode="json")
            values = {"checkpoint": body, "attempts": 0, "progress_at": self.now}
            if not self._update_held(connection, claim, values):
                raise _fenced(claim)
            connection.execute(
                sa.insert(checkpoint).values(
                    run_id=claim.run_id, fence=claim.fence, step=point.step,
                    job_id=claim.task.job_id, ref=body, created_at=self.now,
                )
            )  # fmt: skip

        self._write(work)

    def complete(
        self,
        claim: Claim,
        result: StageResult,
        *,
        key: str | None = None,
        cached: bool = False,
        events: Iterable[NewEvent] = (),
    ) -> Advanced:
        """Accept the attempt's result: the run is done, what follows is ready, its event written.

        With ``key`` the result is kept for the tenant's later runs of the same key. Returns the
        job's new state and what became ready. Raises Fenced; then nothing has changed.
        """

        def work(connection: Connection) -> Advanced:
            owner = self._lock_job(connection, claim.task.job_id)
            assert owner is not None
            ref = result.artifact.model_dump(mode="json") if result.artifact else None
            done = {
                "state": RunState.done, "artifact": ref, "summary": result.summary,
                "lease_until": None,
            }  # fmt: skip
            if not self._update_held(connection, claim, done):
                raise _fenced(claim)
            self._end_attempt(
                connection, claim.run_id, claim.fence, AttemptOutcome.succeeded, cached=cached
            )
            if key is not None:
                self._remember(connection, claim, key, result)
            task = claim.task
            self._append(connection, task.job_id, events, run_id=task.run_id, fence=task.fence)
            following = pipeline.following_runs(task.stage, task.step, result.next_plans)
            self._insert_runs(connection, owner, following, self._max_attempts(connection, task))
            if task.stage is Stage.training:
                self._succeed(connection, task.job_id, result)
            return self._advance(connection, task.job_id)

        return self._write(work)

    def _succeed(self, connection: Connection, job_id: str, result: StageResult) -> None:
        assert result.artifact is not None, "a training must publish its adapter"
        connection.execute(
            sa.update(job)
            .where(job.c.id == job_id)
            .values(adapter=result.artifact.model_dump(mode="json"), result=result.summary)
        )
        messages = ("New fine-tuned model created", "The job has successfully completed")
        self._append(connection, job_id, [NewEvent(message=text) for text in messages])

    def _max_attempts(self, connection: Connection, task: StageTask) -> int:
        query = sa.select(run.c.max_attempts).where(run.c.id == task.run_id)
        return int(connection.execute(query).scalar_one())

    def fail(self, claim: Claim, error: LlamaHomeError, *, retry_seconds: float = 1.0) -> RunState:
        """Record a failed attempt and decide what follows.

        The user's error fails the job at once. Anything else is tried again after
        ``retry_seconds * 4^n``, and parked (the job fails) after ``max_attempts`` without
        progress. Returns the run's new state. Raises Fenced.
        """

        def work(connection: Connection) -> RunState:
            owner = self._lock_job(connection, claim.task.job_id)
            assert owner is not None
            held = self._held(connection, claim)
            if held is None:
                raise _fenced(claim)
            if isinstance(error, UserError):
                state, outcome = RunState.failed, AttemptOutcome.failed
            elif held.attempts >= held.max_attempts:
                state, outcome = RunState.parked, AttemptOutcome.failed
            else:
                state, outcome = RunState.ready, AttemptOutcome.retried
            wait = retry_seconds * BACKOFF_FACTOR ** max(0, held.attempts - 1)
            values = {
                "state": state, "last_error": error.to_dict(), "lease_until": None,
                "owner": None, "ready_at": self.now, "rung_at": None,
                "not_before": self.now + wait if state is RunState.ready else None,
            }  # fmt: skip
            self._update_held(connection, claim, values)
            self._end_attempt(connection, claim.run_id, claim.fence, outcome, error=error)
            self._after_failure(connection, owner, state, error)
            return state

        return self._write(work)

    def _after_failure(
        self, connection: Connection, owner: Row[Any], state: RunState, error: LlamaHomeError
    ) -> None:
        if state is RunState.ready:
            again = NewEvent(message=f"Will be tried again: {error}", level="warn")
            self._append(connection, owner.id, [again])
            self._advance(connection, owner.id)
            return
        reported = job_error(error)
        if state is RunState.parked and error.code not in ("worker_lost", "internal_error"):
            known = {"code": "internal_error", "message": f"{error.code}: {reported.message}"}
            reported = reported.model_copy(update=known)
        self._finish_job(connection, owner, JobState.failed, reported)
        self._append(connection, owner.id, [NewEvent(message=str(error), level="error")])

    def release(self, claim: Claim, reason: StopReason) -> None:
        """Give the run back unfinished, at no cost: it is ready again (or held, for a pause).

        Where the run is no longer this attempt's there is nothing to give back.
        """

        def work(connection: Connection) -> None:
            self._lock_job(connection, claim.task.job_id)
            values = {
                "state": RunState.blocked, "owner": None, "lease_until": None,
                "attempts": sa.case((run.c.attempts > 0, run.c.attempts - 1), else_=0),
            }  # fmt: skip
            if not self._update_held(connection, claim, values):
                return
            self._end_attempt(connection, claim.run_id, claim.fence, AttemptOutcome.released)
            done = "paused" if reason is StopReason.pause else "handed back by its worker"
            self._append(
                connection, claim.task.job_id, [NewEvent(message=f"{claim.task.stage} {done}")]
            )
            self._advance(connection, claim.task.job_id)

        self._write(work)

    def cached(self, tenant: str, key: str) -> StageResult | None:
        """What an earlier run of the same key came to, for this tenant."""
        query = sa.select(artifact).where(artifact.c.tenant == tenant, artifact.c.key == key)
        row = self._read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            return None
        ref = ArtifactRef.model_validate(row.ref) if row.ref else None
        return StageResult(artifact=ref, summary=row.summary, next_plans=tuple(row.next_plans))

    def forget(self, tenant: str, key: str) -> None:
        """Drop a kept result whose artifact turned out to be gone or damaged."""
        query = sa.delete(artifact).where(artifact.c.tenant == tenant, artifact.c.key == key)
        self._write(lambda connection: connection.execute(query))

    def _remember(
        self, connection: Connection, claim: Claim, key: str, result: StageResult
    ) -> None:
        mine = sa.and_(artifact.c.tenant == claim.tenant, artifact.c.key == key)
        if connection.execute(sa.select(artifact.c.key).where(mine)).one_or_none() is not None:
            return
        with connection.begin_nested() as savepoint:
            try:
                connection.execute(
                    sa.insert(artifact).values(
                        tenant=claim.tenant, key=key, stage=claim.task.stage,
                        ref=result.artifact.model_dump(mode="json") if result.artifact else None,
                        summary=result.summary, next_plans=list(result.next_plans),
                        created_at=self.now,
                    )
                )  # fmt: skip
            except sa.exc.IntegrityError:
                savepoint.rollback()  # an equal run finished at the same moment

    def _update_held(self, connection: Connection, claim: Claim, values: dict[str, Any]) -> bool:
        """Change the run if this attempt still holds it; False when it does not."""
        changed = connection.execute(sa.update(run).where(*_mine(claim)).values(**values))
        return changed.rowcount == 1

    def _held(self, connection: Connection, claim: Claim) -> Row[Any] | None:
        return connection.execute(sa.select(run).where(*_mine(claim))).one_or_none()

    def _lost_reason(self, connection: Connection, claim: Claim) -> StopReason:
        state = connection.execute(
            sa.select(job.c.state).where(job.c.id == claim.task.job_id)
        ).scalar_one()
        return StopReason.cancel if state == JobState.cancelled else StopReason.fenced

    def _expire(self, connection: Connection, stage: Stage | None = None) -> list[str]:
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
        parked = row.attempts >= row.max_attempts
        connection.execute(
            sa.update(run)
            .where(run.c.id == row.id)
            .values(
                state=RunState.parked if parked else RunState.ready,
                last_error=error.to_dict(),
                owner=None,
                lease_until=None,
                ready_at=self.now,
                rung_at=None,
                not_before=None,
            )
        )
        self._end_attempt(connection, row.id, row.fence, AttemptOutcome.lost, error=error)
        owner = self._lock_job(connection, row.job_id)
        assert owner is not None
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


def _mine(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        run.c.id == claim.run_id,
        run.c.fence == claim.fence,
        run.c.state == RunState.running,
    )


def _fenced(claim: Claim) -> Fenced:
    return Fenced(
        f"run {claim.run_id} is no longer held under fence {claim.fence}; "
        "nothing of this attempt was committed"
    )
