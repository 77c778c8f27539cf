"""Nothing that is asked of a database waits for ever, and what does not answer is Unavailable."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from llamahome.errors import Unavailable
from llamahome.ledger import Ledger, postgres
from llamahome.ledger.tables import job as jobs
from llamahome.schemas import JobSpec

on_postgres = pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)


def test_a_pool_whose_connections_are_all_in_use_is_unavailable(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger.engine.pool, "_timeout", 0.1)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(sa.exc.TimeoutError):
            while True:
                stack.enter_context(ledger.engine.connect())
        with pytest.raises(Unavailable, match="no connection is free"):
            ledger.clock()
    assert ledger.clock() > 0


@on_postgres
def test_the_server_is_told_how_long_it_may_take(ledger_url: str) -> None:
    def shown(ledger: Ledger) -> list[str]:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        with ledger.engine.connect() as connection:
            return [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]

    ledger = Ledger(ledger_url)
    assert shown(ledger) == ["10s", "8s", "10s"]
    ledger.upgrade()
    assert shown(ledger) == ["10s", "8s", "10s"], "a migration lifts them for itself alone"
    with ledger.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, postgres.BoundedConnection)
        assert driver.answer_seconds == postgres.ANSWER_SECONDS
        told = driver.info.get_parameters()
    ledger.close()
    assert (told["connect_timeout"], told["tcp_user_timeout"]) == ("5", "10000")
    assert (told["keepalives_idle"], told["keepalives_count"]) == ("10", "2")


@on_postgres
def test_what_the_url_says_itself_stands(ledger_url: str) -> None:
    url = sa.make_url(ledger_url)
    options = f"{url.query['options']} -cstatement_timeout=77s"
    url = url.update_query_dict({"options": options, "connect_timeout": "3"})
    ledger = Ledger(url.render_as_string(hide_password=False))
    with ledger.engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == "77s"
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar_one() == "8s"
        driver = connection.connection.driver_connection
        assert isinstance(driver, postgres.BoundedConnection)
        assert driver.info.get_parameters()["connect_timeout"] == "3"
    ledger.close()


@on_postgres
@pytest.mark.parametrize(
    ("limit", "text"),
    [("lock_timeout", "lock timeout"), ("statement_timeout", "statement timeout")],
)
def test_a_row_that_somebody_keeps_locked_is_unavailable(
    ledger: Ledger, ledger_url: str, make_spec: Callable[..., JobSpec], limit: str, text: str
) -> None:
    job, _ = ledger.submit(make_spec())
    url = sa.make_url(ledger_url)
    short = url.update_query_dict({"options": f"{url.query['options']} -c{limit}=200ms"})
    hurried = Ledger(short.render_as_string(hide_password=False))
    with ledger.engine.begin() as connection:
        connection.execute(sa.select(jobs).where(jobs.c.id == job.id).with_for_update())
        with pytest.raises(Unavailable, match=text):
            hurried.cancel(job.id)
    assert hurried.cancel(job.id).cancel_requested
    hurried.close()


def _connect(url: sa.URL) -> socket.socket:
    """To the server's port or, where its host is a folder, to its socket there."""
    host, port = str(url.query.get("host") or url.host), url.port or 5432
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    far = socket.socket(socket.AF_UNIX)
    far.connect(f"{host}/.s.PGSQL.{port}")
    return far


@pytest.fixture
def proxy(ledger_url: str) -> Iterator[tuple[str, threading.Event]]:
    """The server behind a proxy, which goes on taking bytes after the event but passes none on."""
    url, cut = sa.make_url(ledger_url), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not cut.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(pumps: ThreadPoolExecutor) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], _connect(url)
                ends.extend((near, far))
                pumps.submit(pump, near, far)
                pumps.submit(pump, far, near)

    through = url.set(host="127.0.0.1", port=listener.getsockname()[1])
    through = through.difference_update_query(["host"])
    with ThreadPoolExecutor(32) as pumps:
        serving = threading.Thread(target=serve, args=(pumps,))
        serving.start()
        yield through.render_as_string(hide_password=False), cut
        for end in (listener, *ends):
            with contextlib.suppress(OSError):  # one that has ended already
                end.shutdown(socket.SHUT_RDWR)
        serving.join()
    for end in (listener, *ends):
        end.close()


@on_postgres
def test_a_connection_that_has_gone_silent_is_given_up_and_the_next_one_works(
    proxy: tuple[str, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cut = proxy
    monkeypatch.setattr(postgres.BoundedConnection, "answer_seconds", 0.5)
    ledger = Ledger(url)
    assert ledger.clock() > 0
    began = time.monotonic()

    def ask(connection: sa.Connection) -> None:
        connection.execute(sa.select(1))
        cut.set()
        connection.execute(sa.select(2))

    with pytest.raises(Unavailable, match=r"no answer within 0\.5 s"):
        ledger._read(ask)
    assert time.monotonic() < began + 3
    cut.clear()
    assert ledger.clock() > 0
    ledger.close()


@on_postgres
def test_a_server_that_accepts_and_never_speaks_is_given_up(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgres._CLIENT, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        away = Ledger(f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/none")
        with pytest.raises(Unavailable, match="timeout"):
            away.clock()
