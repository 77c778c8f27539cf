"""Two databases behind one set of statements: SQLite on one host, PostgreSQL in a fleet.

Every writing transaction takes its write lock at the start (``BEGIN IMMEDIATE`` on SQLite): a
deferred one that reads and then writes fails at once with "database is locked", whatever the
busy timeout. Deadlocks, which PostgreSQL resolves by aborting one side, are retried here. How long
PostgreSQL is waited for stands in ``ledger.postgres``; SQLite's lock is, for ``BUSY_SECONDS``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from llamahome.errors import InvalidConfig, Unavailable
from llamahome.ledger.storable import storable_json

T = TypeVar("T")
_DEADLOCK_RETRIES = 8
_RETRIABLE_SQLSTATES = frozenset({"40P01", "40001"})  # deadlock_detected, serialization_failure
_WRITE = "llamahome_write"
BUSY_SECONDS = 30


class Backend:
    """Connections, transactions and the clock; the rest of the ledger is written on these."""

    def __init__(self, url: str) -> None:
        """``url`` is an SQLAlchemy URL (sqlite:///path or postgresql+psycopg://...).

        Opens nothing yet. Raises InvalidConfig for a URL of another database.
        """
        self._url = _checked(url)
        self.sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = self._create_engine()

    @property
    def engine(self) -> Engine:
        return self._engine

    def describe(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    def close(self) -> None:
        self._engine.dispose()

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The database's clock, Unix seconds.

        SQLite's ``unixepoch('subsec')`` is NULL before 3.42, hence the Julian day.
        """
        if self.sqlite:
            return sa.type_coerce(sa.text("((julianday('now')-2440587.5)*86400.0)"), sa.Double)
        return sa.type_coerce(sa.text("extract(epoch from clock_timestamp())::float8"), sa.Double)

    def clock(self) -> float:
        """The database's time now, Unix seconds."""
        return self._read(
            lambda connection: float(connection.execute(sa.select(self.now)).scalar_one())
        )

    def _read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that does not write. Raises Unavailable."""
        return self._run(work, write=False)

    def _write(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a writing transaction, again after a deadlock. Raises Unavailable."""
        return self._run(work, write=True)

    def _run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        for attempts_left in reversed(range(_DEADLOCK_RETRIES)):
            try:
                with self._engine.connect().execution_options(**{_WRITE: write}) as connection:
                    with connection.begin():
                        return work(connection)
            except DBAPIError as error:
                if attempts_left and _retriable(error):
                    continue
                if isinstance(error, OperationalError) or error.connection_invalidated:
                    raise self._unavailable(str(error.orig)) from error
                raise
            except PoolTimeout as error:
                raise self._unavailable(f"no connection is free: {error.args[0]}") from error
        raise AssertionError("the last attempt returns or raises")

    def _unhurried(self, connection: Connection) -> AbstractContextManager[None]:
        """Within it a transaction may take as long as it takes."""
        if self.sqlite:
            return nullcontext()
        from llamahome.ledger import postgres

        return postgres.unhurried(connection)

    def _unavailable(self, cause: str) -> Unavailable:
        first_line = cause.strip().partition("\n")[0]
        return Unavailable(
            f"the ledger {self.describe()} does not answer: {first_line}",
            code="ledger_unavailable",
            remedy="Check LLAMAHOME_LEDGER_URL and run `llamahome doctor`",
        )

    def _create_engine(self) -> Engine:
        if not self.sqlite:
            return _postgres_engine(self._url)
        engine = sa.create_engine(
            self._url,
            json_serializer=storable_json,
            # The driver must not begin transactions on its own: _begin says which kind.
            connect_args={"isolation_level": None, "timeout": BUSY_SECONDS},
        )
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin)
        return engine


def _postgres_engine(url: URL) -> Engine:
    from llamahome.ledger import postgres  # psycopg is not loaded for a ledger on SQLite

    engine = sa.create_engine(
        url,
        json_serializer=storable_json,
        connect_args=postgres.connect_args(url),
        pool_pre_ping=True, pool_size=4, max_overflow=4, pool_timeout=postgres.POOL_SECONDS,
    )  # fmt: skip

    def connect(_dialect: Any, _record: Any, args: Any, parameters: Any) -> Any:
        return postgres.BoundedConnection.connect(*args, **parameters)

    sa.event.listen(engine, "do_connect", connect)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # synchronous=FULL: "accepted" must survive a power cut, and NORMAL may lose the last commits.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _retriable(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) in _RETRIABLE_SQLSTATES


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError:
        raise InvalidConfig(
            "is not a database URL", field="LLAMAHOME_LEDGER_URL",
            remedy="Write sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
        ) from None  # fmt: skip
    if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise InvalidConfig(
            f"{parsed.drivername} is not supported", field="LLAMAHOME_LEDGER_URL",
            remedy="Use sqlite or postgresql+psycopg",
        )  # fmt: skip
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise InvalidConfig(
                "an in-memory ledger would lose jobs", field="LLAMAHOME_LEDGER_URL",
                remedy="Name a file: sqlite:///PATH",
            )  # fmt: skip
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    return parsed


def new_id(prefix: str) -> str:
    """``prefix`` and 96 random bits: not guessable, and no id is ever made twice."""
    return f"{prefix}{secrets.token_hex(12)}"
