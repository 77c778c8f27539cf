"""Commands about base models."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from llamahome.cli.bases import base_digest, check_base, check_name
from llamahome.cli.context import (
    Json,
    State,
    connect,
    direct_settings,
    open_ledger,
)
from llamahome.cli.exits import require
from llamahome.cli.output import put, put_json, put_table, say

app = typer.Typer(help="List the models; register a base, make a tiny one.")


@app.callback(invoke_without_command=True)
def models(context: typer.Context, state: State = None, as_json: Json = False) -> None:
    """List the models; register a base, make a tiny one."""
    if context.invoked_subcommand is not None:
        return
    with connect(state) as client:
        found = client.models()
    if as_json:
        put_json(found)
        return
    put_table(
        ("MODEL", "KIND", "BASE"),
        [
            [model.id, "fine-tuned" if model.parent else "base", model.parent or "-"]
            for model in found
        ],
    )


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its public name: a-z 0-9 . _ -")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="As transformers saves it; safetensors only.")
    ],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Register the base in DIR under NAME.

    It is written to the ledger directly. The workers read the folder from the same path. The same
    name again replaces the folder.
    """
    check_name(name)
    check_base(folder)
    place = folder.resolve()
    settings = direct_settings(state)
    with contextlib.closing(open_ledger(settings, create=True)) as ledger:
        base = ledger.add_base(name, str(place), base_digest(place))
    if as_json:
        put_json(base)
    else:
        put(f"{base.name} {base.digest} {base.path}")


@app.command("make-tiny")
def make_tiny(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make a tiny base, to try the fleet with.

    About a million parameters, trained for some seconds on a bundled text. Needs the training
    extra.
    """
    require("training")
    from llamahome.training.tiny import make_tiny as make

    make(folder)
    digest = base_digest(folder)
    if as_json:
        put_json({"path": str(folder.resolve()), "digest": digest})
    else:
        put(f"{folder} {digest}")
        say(f"register it: llamahome models add tiny {shlex.quote(str(folder))}")
