"""Claiming runs.

A claim raises the run's fence and takes a lease; every later write of that attempt carries the
fence, and a stale one changes no row. Leases are for liveness, the fence is for safety
(Kleppmann 2016, "How to do distributed locking": the resource must check the token).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection, Row

from llamahome.errors import Fenced, OperatorError
from llamahome.ledger import pipeline
from llamahome.ledger.failing import Failing
from llamahome.ledger.fairness import claim_order
from llamahome.ledger.rows import output_view
from llamahome.ledger.tables import attempt, checkpoint, job, run
from llamahome.schemas import (
    CheckpointRef,
    JobSpec,
    RunState,
    Stage,
    StageTask,
    Step,
)


class Claim(NamedTuple):
    """A run in somebody's hands: the task, and the lease it is held under.

    ``alone`` says that no other run may share the worker with it: it is the last try, and the
    earlier ones, which had company, made no progress.
    """

    task: StageTask
    tenant: str
    worker: str
    lease_seconds: float
    alone: bool = False

    @property
    def run_id(self) -> str:
        return self.task.run_id

    @property
    def fence(self) -> int:
        return self.task.fence


class Claims(Failing):
    """The statements that give a run to a worker."""

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
        beside: bool = False,
    ) -> Claim | None:
        """Take the best ready run of a stage, or None when there is none.

        Runs whose lease has expired are taken back first. With ``warm_base`` a run of that base
        goes before the others, unless one of them has waited longer than ``affinity_seconds``.
        ``beside`` says that the worker has runs of ``warm_base`` at work: only its like may join
        them, none that must run alone, and none while another base has waited for so long.
        A job whose rows this release cannot read fails here, and the next one is taken.
        Raises Unavailable.
        """

        def work(connection: Connection) -> Claim | None:
            self._expire(connection, stage)
            while picked := self._pick(connection, stage, warm_base, affinity_seconds):
                if beside and not _may_join(picked, warm_base):
                    return None
                taken = self._take(connection, picked, worker, lease_seconds)
                if taken is None:
                    return None
                self._insert_attempt(connection, taken, picked.ready_at, worker, host, pid)
                self._note_start(connection, taken)
                try:
                    task = self._task(connection, taken)
                except ValueError as error:  # pydantic's, or an enum's
                    self._fail_run(connection, taken, _unreadable(taken, error), RunState.parked)
                    continue
                alone = taken.max_attempts > 1 and taken.attempts >= taken.max_attempts
                return Claim(task, taken.tenant, worker, lease_seconds, alone)
            return None

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
            sa.select(
                run.c.id,
                run.c.ready_at,
                run.c.fence,
                run.c.base,
                run.c.attempts,
                run.c.max_attempts,
            )
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
        inputs = pipeline.in_order(output_view(row) for row in done)
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
            earlier=self._earlier(connection, taken),
        )

    def _earlier(self, connection: Connection, taken: Row[Any]) -> tuple[CheckpointRef, ...]:
        """The run's checkpoints before the one it resumes from, newest first."""
        kept = connection.execute(
            sa.select(checkpoint.c.ref)
            .where(checkpoint.c.run_id == taken.id)
            .order_by(checkpoint.c.created_at.desc(), checkpoint.c.step.desc())
        ).scalars()
        return tuple(CheckpointRef.model_validate(ref) for ref in kept if ref != taken.checkpoint)

    def _update_held(self, connection: Connection, claim: Claim, values: dict[str, Any]) -> bool:
        """Change the run if this attempt still holds it; False when it does not."""
        changed = connection.execute(sa.update(run).where(*mine(claim)).values(**values))
        return changed.rowcount == 1

    def _held(self, connection: Connection, claim: Claim) -> Row[Any] | None:
        return connection.execute(sa.select(run).where(*mine(claim))).one_or_none()


def _unreadable(taken: Row[Any], error: ValueError) -> OperatorError:
    cause = str(error)
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        cause = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return OperatorError(
        f"job {taken.job_id} cannot be read by this release: {cause}",
        remedy="Where a newer release wrote it, bring every worker up to date, then retry the job",
    )


def _may_join(picked: Row[Any], base: str | None) -> bool:
    return bool(picked.base == base and picked.attempts < max(1, picked.max_attempts - 1))


def mine(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    """The run, if this attempt still holds it."""
    return (
        run.c.id == claim.run_id,
        run.c.fence == claim.fence,
        run.c.state == RunState.running,
    )


def fenced(claim: Claim) -> Fenced:
    """The error of an attempt that does not."""
    return Fenced(
        f"run {claim.run_id} is no longer held under fence {claim.fence}; "
        "nothing of this attempt was committed"
    )
