"""Having a finished run done again, because what it left is damaged."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llamahome.errors import LlamaHomeError
from llamahome.ledger.claims import Claim, fenced
from llamahome.ledger.runs import Runs
from llamahome.ledger.tables import artifact, run
from llamahome.ledger.transitions import Advanced
from llamahome.schemas import AttemptOutcome, NewEvent, RunState


class Repairs(Runs):
    """What the attempt that meets a damaged artifact may do about it."""

    def rebuild(self, claim: Claim, path: str, error: LlamaHomeError) -> Advanced | None:
        """Do those runs of the job again whose artifact lies at ``path``.

        The claimed run, which reads it, waits for them, and so do those that are ready: none may
        be claimed with an input missing. The attempt counts, so that a disk that damages
        everything ends the job; the tenant's kept result is forgotten. Returns where the job
        stands, None where the run has no attempt left: then nothing has changed. Raises Fenced.
        """

        def work(connection: Connection) -> Advanced | None:
            job_id = claim.task.job_id
            self._lock_job(connection, job_id)
            held = self._held(connection, claim)
            if held is None:
                raise fenced(claim)
            if held.attempts >= held.max_attempts:
                return None
            connection.execute(
                sa.delete(artifact)
                .where(artifact.c.tenant == claim.tenant)
                .where(artifact.c.ref["path"].as_string() == path)
            )
            again = self._reopen(connection, job_id, path)
            waits = {
                "state": RunState.blocked, "owner": None, "lease_until": None,
                "last_error": error.to_dict(),
            }  # fmt: skip
            self._update_held(connection, claim, waits)
            self._end_attempt(
                connection, claim.run_id, claim.fence, AttemptOutcome.retried, error=error
            )
            events = [NewEvent(message=f"{name} is done again: {error}", level="warn")
                      for name in again]  # fmt: skip
            self._append(connection, job_id, events)
            return self._advance(connection, job_id)

        return self._write(work)

    def _reopen(self, connection: Connection, job_id: str, path: str) -> list[str]:
        """The runs' names. Those that another attempt has reopened are not among them."""
        rows = connection.execute(
            sa.update(run)
            .where(run.c.job_id == job_id, run.c.state == RunState.done)
            .where(run.c.artifact["path"].as_string() == path)
            .values(state=RunState.blocked, attempts=0, artifact=None, summary=None, progress=None)
            .returning(run.c.stage, run.c.step, run.c.shard)
        ).all()
        return [f"{row.stage} {row.step} {row.shard}" for row in rows]
