"""The ledger's tables. Times are Unix seconds (double) by the database's clock, never a worker's.

job 1-n run (stage x step x shard) 1-n attempt (one per fence). ``run.state = 'ready'`` with
``rung_at`` is the outbox: a doorbell is only ever a hint that such a row may exist.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

job = sa.Table(
    "job",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("submission_id", sa.String(256)),
    sa.Column("spec", Json, nullable=False),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    sa.Column("metadata", Json, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("pause_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("error", Json),
    sa.Column("adapter", Json),
    sa.Column("result", Json),
    sa.Column("retry_of", sa.String(64)),
    sa.UniqueConstraint("tenant", "submission_id"),
    sa.Index(None, "tenant", "created_at", "id"),
    sa.Index(None, "state"),
)

run = sa.Table(
    "run",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("job_id", sa.ForeignKey("job.id"), nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("base", sa.String(64), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, default=0),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("step", sa.String(16), nullable=False),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("fence", sa.Integer, nullable=False, default=0),
    # Attempts since the last progress; a new checkpoint sets it back to 0.
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("owner", sa.String(128)),
    sa.Column("lease_until", sa.Double),
    sa.Column("not_before", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("ready_at", sa.Double),
    sa.Column("rung_at", sa.Double),
    sa.Column("plan", Json, nullable=False),
    sa.Column("artifact", Json),
    sa.Column("summary", Json),
    sa.Column("checkpoint", Json),
    sa.Column("progress", Json),
    sa.Column("progress_at", sa.Double),
    sa.Column("last_error", Json),
    sa.UniqueConstraint("job_id", "stage", "step", "shard"),
    sa.Index(None, "stage", "state", "tenant"),
    sa.Index(None, "state", "lease_until"),
)

attempt = sa.Table(
    "attempt",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("fence", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("worker", sa.String(128), nullable=False),
    sa.Column("host", sa.String(256), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("ready_at", sa.Double, nullable=False),
    sa.Column("claimed_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
    sa.Column("outcome", sa.String(16)),
    sa.Column("cached", sa.Boolean, nullable=False, default=False),
    sa.Column("error", Json),
    sa.Index(None, "stage", "outcome"),
)

# How much each tenant has had of a stage, in seconds of worker time: the virtual time that fair
# share compares. A tenant that was idle starts at the least of those that are busy, not at zero.
share = sa.Table(
    "share",
    metadata,
    sa.Column("stage", sa.String(16), primary_key=True),
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("used_seconds", sa.Double, nullable=False),
)

checkpoint = sa.Table(
    "checkpoint",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("fence", sa.Integer, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("job_id", sa.ForeignKey("job.id"), nullable=False),
    sa.Column("ref", Json, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index(None, "job_id"),
)

event = sa.Table(
    "event",
    metadata,
    sa.Column(
        "seq",
        # Only INTEGER is an autoincrementing primary key on SQLite.
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("job_id", sa.ForeignKey("job.id"), nullable=False),
    sa.Column("run_id", sa.String(64)),
    sa.Column("fence", sa.Integer),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("level", sa.String(8), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", Json, nullable=False),
    sa.Index(None, "job_id", "seq"),
    sqlite_autoincrement=True,
)

artifact = sa.Table(
    "artifact",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("ref", Json),
    sa.Column("summary", Json, nullable=False),
    sa.Column("next_plans", Json, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

file = sa.Table(
    "file",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("filename", sa.String(512), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("path", sa.String(512), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("deleted_at", sa.Double),
    sa.Index(None, "tenant", "created_at", "id"),
)

base = sa.Table(
    "base",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

api_key = sa.Table(
    "api_key",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
)

worker = sa.Table(
    "worker",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("role", sa.String(32), nullable=False),
    sa.Column("host", sa.String(256), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),
    sa.Column("metrics_port", sa.Integer),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("heartbeat_at", sa.Double, nullable=False),
    sa.Column("info", Json, nullable=False),
)
