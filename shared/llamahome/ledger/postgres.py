"""How long PostgreSQL is waited for: nothing that the ledger asks of it may hang a process.

A lease of 30 s is given up when it was not renewed for 24 s, and is renewed every 10 s. So no wait
is longer than about 10 s: a renewal that gets no answer is followed by another one in time. The
ledger's own statements take milliseconds.

The server ends what takes too long there. It cannot do so where it is frozen or cut off, and
neither TCP nor the operating system notices a proxy that takes bytes and passes none on: hence
:class:`BoundedConnection`, which stops waiting by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy.engine import URL, Connection

RV = TypeVar("RV")

CONNECT_SECONDS = 5
LOCK_SECONDS = 8  # before STATEMENT_SECONDS, so that the error names the lock
STATEMENT_SECONDS = 10
# A transaction is a handful of statements: a process that is frozen in one must not keep its locks.
IDLE_IN_TRANSACTION_SECONDS = 10
ANSWER_SECONDS = 12.0  # after STATEMENT_SECONDS, so that the server's own error arrives first
POOL_SECONDS = 10.0  # for a connection while all are in use

# libpq, 32.1.2 "Parameter Key Words": a dead host is noticed after 10 + 2 * 5 s of silence, or 10 s
# after bytes that nobody acknowledged.
_CLIENT = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 10_000,
}
_SERVER = {
    "statement_timeout": STATEMENT_SECONDS,
    "lock_timeout": LOCK_SECONDS,
    "idle_in_transaction_session_timeout": IDLE_IN_TRANSACTION_SECONDS,
}


class BoundedConnection(psycopg.Connection[Any]):
    """Closes itself and raises OperationalError where the server gives no answer in time."""

    answer_seconds: float | None = ANSWER_SECONDS

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        try:
            return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if timeout is not None or self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            # The answer may still come, to a question that nobody remembers.
            self.close()
            raise psycopg.OperationalError(f"no answer within {self.answer_seconds:g} s") from error


def connect_args(url: URL) -> dict[str, Any]:
    """Connection parameters for psycopg; what the URL says itself stands."""
    given = {name: value for name, value in _CLIENT.items() if name not in url.query}
    limits = [f"-c{name}={seconds}s" for name, seconds in _SERVER.items()]
    return {**given, "options": " ".join([*limits, str(url.query.get("options", ""))]).strip()}


@contextmanager
def unhurried(connection: Connection) -> Iterator[None]:
    """Lift the limits for a transaction that may take its time, such as a migration's."""
    driver = cast(BoundedConnection, connection.connection.driver_connection)
    for name in _SERVER:
        connection.exec_driver_sql(f"SET LOCAL {name} = 0")
    driver.answer_seconds = None
    try:
        yield
    finally:
        driver.answer_seconds = ANSWER_SECONDS
