from __future__ import annotations

import contextlib
import http.server
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamahome.ledger import Ledger

from .conftest import RunCommand


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with an empty ledger, as `up` leaves one."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    with contextlib.closing(Ledger(f"sqlite:///{folder}/ledger.sqlite3")) as ledger:
        ledger.upgrade()
    return folder


def _ledger(state: Path) -> contextlib.closing[Ledger]:
    return contextlib.closing(Ledger(f"sqlite:///{state}/ledger.sqlite3"))


def test_a_created_key_is_valid_at_once_and_its_tenants(llamahome: RunCommand, state: Path) -> None:
    made = llamahome("keys", "create", "--tenant", "acme", "--state", state, "--json").json
    assert sorted(made) == ["id", "key", "tenant"]
    with _ledger(state) as ledger:
        assert ledger.tenant_of(made["key"]) == made["tenant"] == "acme"


@pytest.mark.parametrize("tenant", ["", "../x", "a/b", "a" * 65, ".x", "a b"])
def test_a_tenant_that_could_not_stand_in_a_path_is_refused(
    llamahome: RunCommand, state: Path, tenant: str
) -> None:
    ran = llamahome("keys", "create", "--tenant", tenant, "--state", state)
    assert (ran.code, ran.out) == (1, "")
    assert "is not a tenant name" in ran.err


def test_a_key_for_people_is_three_lines(llamahome: RunCommand, state: Path) -> None:
    ran = llamahome("keys", "create", "--tenant", "acme", "--state", state)
    assert [line.split()[0] for line in ran.out.splitlines()] == ["id", "tenant", "key"]


def test_the_state_variable_serves_as_well(
    llamahome: RunCommand, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_STATE", str(state))
    assert llamahome("keys", "create", "--tenant", "t").code == 0


def test_a_ledger_url_needs_no_state_folder(
    llamahome: RunCommand, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_LEDGER_URL", f"sqlite:///{state}/ledger.sqlite3")
    assert llamahome("keys", "create", "--tenant", "t").code == 0


@pytest.mark.parametrize(
    "words", [("keys", "create", "--tenant", "t"), ("ps",), ("ledger", "check")]
)
def test_a_mistyped_state_folder_is_not_taken_for_a_new_fleet(
    llamahome: RunCommand, tmp_path: Path, words: tuple[str, ...]
) -> None:
    ran = llamahome(*words, "--state", tmp_path / "typo")
    assert ran.code == 1
    assert "no such ledger" in ran.err
    assert not (tmp_path / "typo").exists()


def test_nothing_named_at_all_says_what_to_name(llamahome: RunCommand) -> None:
    ran = llamahome("keys", "create", "--tenant", "t")
    assert ran.code == 1
    assert "--state or LLAMAHOME_STATE" in ran.err


def test_ledger_upgrade_makes_the_schema_and_check_finds_it_current(
    llamahome: RunCommand, tmp_path: Path
) -> None:
    state = tmp_path / "new"
    made = llamahome("ledger", "upgrade", "--state", state, "--json")
    assert made.code == 0
    assert llamahome("ledger", "upgrade", "--state", state).code == 0
    assert llamahome("ledger", "check", "--state", state, "--json").json == made.json


def test_a_schema_of_another_version_is_refused_with_the_way_out(
    llamahome: RunCommand, state: Path
) -> None:
    with contextlib.closing(sqlite3.connect(state / "ledger.sqlite3")) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    for words in (("ledger", "check"), ("keys", "create", "--tenant", "t"), ("ps",)):
        ran = llamahome(*words, "--state", state)
        assert ran.code == 1
        assert "9999" in ran.err
        assert "`llamahome ledger upgrade`" in ran.err


def test_models_add_registers_the_folder_by_digest_even_before_the_first_up(
    llamahome: RunCommand, tmp_path: Path, base_folder: Path
) -> None:
    state = tmp_path / "new"
    ran = llamahome("models", "add", "mine", base_folder, "--state", state, "--json")
    assert ran.code == 0
    with _ledger(state) as ledger:
        base = ledger.base("mine")
    assert (ran.json["digest"], ran.json["path"]) == (base.digest, str(base_folder))


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [("a:b", "base", "is not a base name"), ("mine", "none", "no such folder")],
)
def test_models_add_refuses_a_wrong_name_or_folder(
    llamahome: RunCommand, state: Path, base_folder: Path, name: str, folder: str, said: str
) -> None:
    ran = llamahome("models", "add", name, folder, "--state", state)
    assert ran.code == 1
    assert said in ran.err
    with _ledger(state) as ledger:
        assert ledger.bases() == []


def test_ps_reads_the_ledger_of_a_state_folder_gateway_or_not(
    llamahome: RunCommand, state: Path
) -> None:
    with _ledger(state) as ledger:
        ledger.heartbeat(
            "validation-h-1", role="validation", host="h", pid=1, state="up", version="0",
            slots=1, metrics_port=9, info={},
        )  # fmt: skip
    assert [row["role"] for row in llamahome("ps", "--state", state, "--json").json] == [
        "validation"
    ]
    line = llamahome("ps", "--state", state).out.splitlines()[1].split()
    assert line[:4] == ["validation", "1", "h", "up"]


def test_recipes_lists_the_built_in_one(llamahome: RunCommand) -> None:
    assert "quick" in llamahome("recipes", "--json").json
    assert llamahome("recipes").out.splitlines()[1].startswith("quick  ")


@pytest.fixture
def site() -> Iterator[str]:
    """A server that answers /ok with 200 and everything else with 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ok" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet: the tests read stderr."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "code", "said"), [("/ok", 0, ""), ("/no", 3, "answers 404, not 200")]
)
def test_health_is_by_the_status(
    llamahome: RunCommand, site: str, path: str, code: int, said: str
) -> None:
    ran = llamahome("health", site + path)
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("http://127.0.0.1:1/", 3, "does not answer"),
        ("file:///etc/passwd", 1, "is not an http URL"),
        ("http://", 3, "does not answer"),
    ],
)
def test_health_of_nothing_is_one_line(
    llamahome: RunCommand, url: str, code: int, said: str
) -> None:
    ran = llamahome("health", url)
    assert ran.code == code
    assert said in ran.err
    assert ran.err.count("\n") == 1
