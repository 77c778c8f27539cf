"""Where a command works: which settings, which fleet, which key."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer

from llamahome.cli.exits import USAGE, require
from llamahome.cli.output import say
from llamahome.errors import InvalidConfig, InvalidData, NotFound

# Here and in the command modules the heavier imports stand in the functions that need them: help
# and `llamahome health`, which runs every few seconds in a container, must start at once.
if TYPE_CHECKING:
    from llamahome.client import Client
    from llamahome.config import Settings
    from llamahome.ledger import Ledger

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Folder of a one-machine fleet (or LLAMAHOME_STATE).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON value on stdout.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", show_default=False)]


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a fleet listens, and with which key. ``pid`` is of the `up` that serves it."""

    url: str
    key: str = dataclasses.field(repr=False)
    pid: int | None = None


def endpoint(state: Path | None) -> Endpoint:
    """The fleet to talk to.

    A state folder named on the command line beats LLAMAHOME_URL and LLAMAHOME_KEY, which beat the
    endpoint file of LLAMAHOME_STATE or ./.llamahome. Raises InvalidConfig or NotFound.
    """
    from llamahome.config import load_settings

    settings = load_settings(state=state)
    if state is None and (settings.url or settings.key):
        if settings.url is None or settings.key is None:
            unset, present = ("URL", "KEY") if settings.url is None else ("KEY", "URL")
            raise InvalidConfig(
                f"not set, but LLAMAHOME_{present} is", field=f"LLAMAHOME_{unset}",
                remedy="Set both, or neither to use the endpoint file of `llamahome up`",
            )  # fmt: skip
        return Endpoint(settings.url, settings.key.get_secret_value())
    found = read_endpoint(settings.endpoint_file)
    if found is None:
        raise NotFound(
            "no fleet has written this file", file=str(settings.endpoint_file),
            code="no_fleet",
            remedy="Start one with `llamahome up`, or set LLAMAHOME_URL and LLAMAHOME_KEY",
        )  # fmt: skip
    return found


def read_endpoint(file: Path) -> Endpoint | None:
    """What `up` wrote, or None when there is no such file. Raises InvalidData if it is torn."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Endpoint(str(content["url"]), str(content["key"]), int(content["pid"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(
            f"is not an endpoint file ({type(error).__name__}: {error})", file=str(file),
            remedy="Remove it and start `llamahome up` again",
        ) from None  # fmt: skip


def connect(state: Path | None) -> Client:
    """A client of the fleet that :func:`endpoint` names; a context manager."""
    from llamahome.client import Client

    where = endpoint(state)
    return Client(where.url, where.key)


def direct_settings(state: Path | None) -> Settings:
    """Settings for a command that reads the ledger itself.

    ./.llamahome is used where it exists and nothing else is named, as for the endpoint file.
    """
    from llamahome.config import DEFAULT_STATE, load_settings

    settings = load_settings(state=state)
    if settings.state is None and settings.ledger_url is None and DEFAULT_STATE.is_dir():
        return load_settings(state=DEFAULT_STATE)
    return settings


def open_ledger(settings: Settings, *, create: bool = False) -> Ledger:
    """The ledger of ``settings``, its schema checked; close it.

    With ``create`` an empty one is given its schema. Otherwise a ledger file must be there, so that
    a mistyped folder is not taken for a new fleet. Raises InvalidConfig where none is named,
    NotFound, InvalidState for a schema of another version, Unavailable.
    """
    require("fleet")
    from llamahome.ledger import Ledger

    file = unquote(settings.ledger.partition("sqlite:///")[2].partition("?")[0])
    if file and not create and not Path(file).is_file():
        raise NotFound(
            "no such ledger", file=file, code="no_ledger",
            remedy="Start a fleet there with `llamahome up`, or name its folder with --state",
        )  # fmt: skip
    ledger = Ledger(settings.ledger)
    if create and ledger.revision() is None:
        ledger.upgrade()
    ledger.check_revision()
    return ledger


def group(text: str) -> typer.Typer:
    """A command with commands of its own; called alone it shows them, with exit code 2."""
    made = typer.Typer(help=text)

    @made.callback(invoke_without_command=True)
    def alone(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            say(context.get_help())
            raise typer.Exit(USAGE)

    return made


def command_line(words: str, state: Path | None) -> str:
    """A command to suggest: it names the state folder that this one was given."""
    named = "" if state is None else f" --state {shlex.quote(str(state))}"
    return f"`llamahome {words}{named}`"


def write_endpoint(file: Path, where: Endpoint) -> None:
    """Replace the endpoint file at once; mode 0600, for it holds a key."""
    partial = file.with_name(f"{file.name}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump(dataclasses.asdict(where), out)
    partial.replace(file)
