"""What an attempt may do to the run it holds: renew, checkpoint, complete, fail, release.

Each is one transaction under the attempt's fence, with everything that follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from llamahome.errors import LlamaHomeError
from llamahome.ledger import pipeline
from llamahome.ledger.claims import Claim, Claims, fenced
from llamahome.ledger.tables import artifact, checkpoint, job, run
from llamahome.ledger.transitions import Advanced
from llamahome.schemas import (
    ArtifactRef,
    AttemptOutcome,
    CheckpointRef,
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


class Runs(Claims):
    """The statements of the attempt that holds a run."""

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

    def checkpoint(
        self, claim: Claim, point: CheckpointRef, *, keep: int | None = None
    ) -> list[CheckpointRef]:
        """Move the resume pointer. That is progress: attempts count from zero again.

        Said twice, because the answer was lost, it is one checkpoint; what the first call dropped
        is not named again (nothing refers to those files: they are leftovers).
        With ``keep`` only so many of the run's checkpoints stay known, the newest and the best
        among them in any case. Returns those that were dropped; their files are the caller's to
        delete. Raises Fenced when another attempt holds the run.
        """

        def work(connection: Connection) -> list[CheckpointRef]:
            body = point.model_dump(mode="json")
            values = {"checkpoint": body, "attempts": 0, "progress_at": self.now}
            if not self._update_held(connection, claim, values):
                raise fenced(claim)
            insert = sqlite.insert if self.sqlite else postgresql.insert
            connection.execute(
                insert(checkpoint)
                .values(
                    run_id=claim.run_id, fence=claim.fence, step=point.step,
                    job_id=claim.task.job_id, ref=body, created_at=self.now,
                )
                .on_conflict_do_update(
                    index_elements=[checkpoint.c.run_id, checkpoint.c.fence, checkpoint.c.step],
                    set_={"ref": body},
                )
            )  # fmt: skip
            return [] if keep is None else self._drop_checkpoints(connection, claim, keep)

        return self._write(work)

    def _drop_checkpoints(
        self, connection: Connection, claim: Claim, keep: int
    ) -> list[CheckpointRef]:
        rows = connection.execute(
            sa.select(checkpoint)
            .where(checkpoint.c.run_id == claim.run_id)
            .order_by(checkpoint.c.created_at.desc(), checkpoint.c.step.desc())
        ).all()
        best = next((row for row in rows if row.ref["best"]), None)
        spared = [rows[0], *([best] if best is not None and best is not rows[0] else [])]
        others = [row for row in rows if row not in spared]
        dropped = others[max(0, keep - len(spared)) :]
        for row in dropped:
            connection.execute(
                sa.delete(checkpoint).where(
                    checkpoint.c.run_id == row.run_id, checkpoint.c.fence == row.fence,
                    checkpoint.c.step == row.step,
                )
            )  # fmt: skip
        return [CheckpointRef.model_validate(row.ref) for row in dropped]

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
                raise fenced(claim)
            self._end_attempt(
                connection, claim.run_id, claim.fence, AttemptOutcome.succeeded, cached=cached
            )
            if key is not None:
                self._remember(connection, claim, key, result)
            task = claim.task
            self._append(connection, task.job_id, events, run_id=task.run_id, fence=task.fence)
            following = pipeline.following_runs(task.stage, task.step, result.next_plans)
            if following and not self._planned(connection, task.job_id, following[0].stage):
                self._insert_runs(
                    connection, owner, following, self._max_attempts(connection, task)
                )
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

    def _planned(self, connection: Connection, job_id: str, stage: Stage) -> bool:
        """Whether the stage's shards are there already: a close step may be done again."""
        query = sa.select(run.c.id).where(
            run.c.job_id == job_id, run.c.stage == stage, run.c.step == Step.shard
        )
        return connection.execute(query.limit(1)).first() is not None

    def _max_attempts(self, connection: Connection, task: StageTask) -> int:
        query = sa.select(run.c.max_attempts).where(run.c.id == task.run_id)
        return int(connection.execute(query).scalar_one())

    def fail(self, claim: Claim, error: LlamaHomeError, *, retry_seconds: float = 1.0) -> RunState:
        """Record a failed attempt and decide what follows.

        The user's error fails the job at once. Anything else is tried again after
        ``retry_seconds * 4^n`` (a minute at most), and parked (the job fails) after
        ``max_attempts`` without progress; Unavailable does not count for an hour. Returns the
        run's new state, ``blocked`` while its job is paused. Raises Fenced.
        """

        def work(connection: Connection) -> RunState:
            self._lock_job(connection, claim.task.job_id)
            held = self._held(connection, claim)
            if held is None:
                raise fenced(claim)
            return self._record_failure(connection, held, error, retry_seconds)

        return self._write(work)

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

    def _lost_reason(self, connection: Connection, claim: Claim) -> StopReason:
        state = connection.execute(
            sa.select(job.c.state).where(job.c.id == claim.task.job_id)
        ).scalar_one()
        return StopReason.cancel if state == JobState.cancelled else StopReason.fenced
