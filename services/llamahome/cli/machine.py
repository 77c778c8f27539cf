"""Commands about this machine: a whole fleet on it, a demonstration, a check-up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli.context import Json, State, direct_settings
from llamahome.cli.exits import USER, require
from llamahome.cli.output import put_json, put_table, say

if TYPE_CHECKING:
    from llamahome.config import Settings


def up(
    state: State = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="The gateway's port; 0 is any free one."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Preprocessing processes.")] = 2,
) -> None:
    """Run a whole fleet on this machine, in the foreground.

    Prints `ready URL` once jobs can be submitted. Ctrl-C drains and ends it. All of it lives in DIR
    (./.llamahome unless named).
    """
    require("fleet")
    from llamahome.cli.up import up as run_up

    raise typer.Exit(run_up(state_settings(state, gateway_port=port), preprocessing=workers))


def demo(state: State = None, as_json: Json = False) -> None:
    """Train the bundled sample on a tiny base, end to end.

    Starts a fleet if none runs on DIR, and ends it again. The adapter is fetched to DIR/demo.
    """
    require("training")
    from llamahome.cli.demo import demo as run_demo

    settings = state_settings(state)
    assert settings.state is not None
    raise typer.Exit(run_demo(settings.state, named=state, as_json=as_json))


def doctor(state: State = None, as_json: Json = False) -> None:
    """Check this machine and its fleet.

    Each finding says what to do. Exit 0 if nothing failed; warnings do not count.
    """
    from llamahome.cli.doctor import check_all, failed

    checks = check_all(direct_settings(state))
    if as_json:
        put_json({"ok": not failed(checks), "checks": [check._asdict() for check in checks]})
    else:
        put_table(("CHECK", "STATE", "FOUND"), [[c.name, c.state, c.found] for c in checks])
        for check in checks:
            if check.remedy:
                say(f"{check.state}: {check.name}: {check.remedy}")
    raise typer.Exit(USER if failed(checks) else 0)


def state_settings(state: Path | None, *, gateway_port: int | None = None) -> Settings:
    """Settings with a state folder: the one named, LLAMAHOME_STATE, or ./.llamahome."""
    from llamahome.config import DEFAULT_STATE, load_settings

    settings = load_settings(state=state, gateway_port=gateway_port)
    if settings.state is not None:
        return settings
    return load_settings(state=DEFAULT_STATE, gateway_port=gateway_port)
