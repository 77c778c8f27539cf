"""Commands about the fleet itself."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli.context import Json, State, connect, direct_settings, group, open_ledger
from llamahome.cli.health import check_url
from llamahome.cli.output import MISSING, duration, facts, put, put_json, put_table
from llamahome.errors import InvalidConfig

if TYPE_CHECKING:
    from llamahome.schemas import Worker

# It stands in storage paths (uploads/<tenant>/...).
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

keys = group("API keys.")
ledger = group("The ledger's schema.")


def ps(state: State = None, as_json: Json = False) -> None:
    """List the fleet's processes.

    With a state folder or a ledger URL they are read from the ledger, gateway or not.
    """
    from llamahome.config import load_settings

    settings = load_settings(state=state)
    if settings.state is not None or settings.ledger_url is not None:
        with contextlib.closing(open_ledger(settings)) as opened:
            found = opened.workers()
    else:
        with connect(state) as client:
            found = client.workers()
    if as_json:
        put_json(found)
    else:
        put_table(PS_COLUMNS, [_ps_row(worker) for worker in found])


PS_COLUMNS = ("ROLE", "PID", "HOST", "STATE", "HEARTBEAT", "SLOTS", "HOLDS", "METRICS")


def _ps_row(worker: Worker) -> list[str]:
    return [
        worker.role, str(worker.pid), worker.host, worker.state,
        f"{duration(worker.heartbeat_age_seconds)} ago", str(worker.slots),
        " ".join(worker.holds) or MISSING,
        f":{worker.metrics_port}" if worker.metrics_port else MISSING,
    ]  # fmt: skip


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(metavar="T", help="Whose key it is.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make an API key.

    It is written to the ledger directly, valid at once, and shown only now.
    """
    if not _TENANT.fullmatch(tenant):
        raise InvalidConfig(
            f"{tenant!r} is not a tenant name: letters, digits and . _ - (1 to 64 of them)",
            field="--tenant",
        )
    with contextlib.closing(open_ledger(direct_settings(state))) as opened:
        made = opened.create_key(tenant)
    if as_json:
        put_json(made)
    else:
        facts([("id", made.id), ("tenant", made.tenant), ("key", made.key)])


@ledger.command("upgrade")
def upgrade(state: State = None, as_json: Json = False) -> None:
    """Create or migrate the ledger's schema.

    Safe when repeated, and in several places at once.
    """
    from llamahome.ledger import Ledger

    with contextlib.closing(Ledger(direct_settings(state).ledger)) as opened:
        opened.upgrade()
        revision = opened.revision()
    put_json({"revision": revision}) if as_json else put(f"revision {revision}")


@ledger.command("check")
def check(state: State = None, as_json: Json = False) -> None:
    """Exit 0 if the ledger's schema is the one this version needs."""
    with contextlib.closing(open_ledger(direct_settings(state))) as opened:
        revision = opened.revision()
    put_json({"revision": revision}) if as_json else put(f"revision {revision}, current")


def health(
    url: Annotated[str, typer.Argument(metavar="URL", help="http(s), asked for at most 5 s.")],
    state: State = None,
) -> None:
    """Exit 0 if a GET of URL answers 200."""
    check_url(url)


def recipes(state: State = None, as_json: Json = False) -> None:
    """List the recipes `submit --recipe` knows."""
    from llamahome.config import recipes as known_recipes

    found = known_recipes()
    if as_json:
        put_json(found)
    else:
        put_table(("RECIPE", "WHAT IT IS"), [[name, text] for name, text in found.items()])
