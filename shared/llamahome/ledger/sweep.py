"""The sweeper: level-triggered, everything re-derived from rows, any number of copies."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llamahome.ledger.runs import Runs
from llamahome.ledger.tables import run
from llamahome.schemas import RunState, Stage


class Ring(NamedTuple):
    """So many runs of a stage wait for somebody to hear of them."""

    stage: Stage
    recover: bool
    runs: int


class Sweeping(Runs):
    """What keeps a job from standing still when a process, a message or Redis is lost."""

    def sweep(self, *, rering_seconds: float) -> list[Ring]:
        """Take back expired runs and name the queues to ring, the recovered ones first.

        A ready run is due when it was never rung, or ``rering_seconds`` ago. Those named here
        count as rung: a lost doorbell costs one more round. Raises Unavailable.
        """

        def work(connection: Connection) -> list[Ring]:
            self._expire(connection)
            recover = (run.c.fence > 0).label("recover")
            due = (
                sa.select(run.c.stage, recover, sa.func.count())
                .where(*self._due(rering_seconds))
                .group_by(run.c.stage, recover)
            )
            rings = [Ring(Stage(s), bool(again), int(n)) for s, again, n in connection.execute(due)]
            if rings:
                connection.execute(
                    sa.update(run).where(*self._due(rering_seconds)).values(rung_at=self.now)
                )
            return sorted(rings, key=lambda ring: not ring.recover)

        return self._write(work) if self._anything_due(rering_seconds) else []

    def _anything_due(self, rering_seconds: float) -> bool:
        """Look before taking SQLite's only write lock; most sweeps find nothing."""
        expired = sa.select(run.c.id).where(
            run.c.state == RunState.running, run.c.lease_until < self.now
        )
        ready = sa.select(run.c.id).where(*self._due(rering_seconds))
        query = sa.select(sa.or_(sa.exists(expired), sa.exists(ready)))
        return self._read(lambda connection: bool(connection.execute(query).scalar_one()))

    def _due(self, rering_seconds: float) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            run.c.state == RunState.ready,
            sa.or_(run.c.not_before.is_(None), run.c.not_before <= self.now),
            sa.or_(run.c.rung_at.is_(None), run.c.rung_at < self.now - rering_seconds),
        )
