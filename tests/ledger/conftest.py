"""One conformance suite, two databases.

SQLite runs everywhere; PostgreSQL where LLAMAHOME_TEST_POSTGRES names a server (an SQLAlchemy URL
of a database in which schemas may be created), and is skipped with that reason elsewhere.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from llamahome.ledger import Claim, Ledger
from llamahome.schemas import BaseRef, FileRef, JobSpec, Stage

POSTGRES = "LLAMAHOME_TEST_POSTGRES"
LEASE_SECONDS = 0.3


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/ledger.sqlite3"
        return
    server = os.environ.get(POSTGRES)
    if not server:
        pytest.skip(f"{POSTGRES} names no PostgreSQL server")
    schema = f"test_{secrets.token_hex(6)}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    url = sa.make_url(server).update_query_dict({"options": f"-csearch_path={schema}"})
    yield url.render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    opened = Ledger(ledger_url)
    opened.upgrade()
    yield opened
    opened.close()


@pytest.fixture
def make_spec() -> Callable[..., JobSpec]:
    def make(tenant: str = "acme", shards: int = 2, base: str = "tiny") -> JobSpec:
        file = FileRef(
            id="file-1",
            filename="a.jsonl",
            path="uploads/acme/a",
            sha256="a" * 64,
            bytes=shards * 10,
        )
        return JobSpec(
            tenant=tenant,
            base=BaseRef(name=base, path="/bases/tiny", digest="b" * 64),
            training_files=(file,),
            config={"epochs": 1},
            shard_bytes=10,
            metadata={"team": tenant},
        )

    return make


@pytest.fixture
def claim(ledger: Ledger) -> Callable[..., Claim | None]:
    def take(stage: Stage, worker: str = "worker-1", seconds: float = 30.0) -> Claim | None:
        return ledger.claim(stage, worker, host="here", pid=1, lease_seconds=seconds)

    return take
