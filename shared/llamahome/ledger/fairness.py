"""Which ready run is the best one: policy in SQL, decided at claim time.

Priority first; then the tenant with the fewest runs of the stage in flight; then the one that has
had the least worker time of it (``share.used_seconds``, the virtual time of weighted fair
queueing, Demers, Keshav and Shenker 1989); then the oldest job, in shard order.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from llamahome.ledger.tables import run, share
from llamahome.schemas import RunState, Stage


def claim_order(stage: Stage) -> tuple[sa.ColumnElement[Any], ...]:
    """ORDER BY terms over ``run`` rows of one stage, best first."""
    other = run.alias("other")
    in_flight = (
        sa.select(sa.func.count())
        .where(other.c.stage == stage, other.c.state == RunState.running)
        .where(other.c.tenant == run.c.tenant)
        .scalar_subquery()
    )
    used = (
        sa.select(share.c.used_seconds)
        .where(share.c.stage == stage, share.c.tenant == run.c.tenant)
        .scalar_subquery()
    )
    return (
        run.c.priority.desc(),
        in_flight,
        sa.func.coalesce(used, 0.0),
        run.c.created_at,
        run.c.job_id,
        run.c.shard,
    )
