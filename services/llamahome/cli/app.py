"""The typer application: which commands there are. What each does is in its own module."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from llamahome.cli import data, fleet, jobs, machine, models, processes, train
from llamahome.cli.exits import report
from llamahome.cli.output import put

app = typer.Typer(
    name="llamahome",
    # Plain help: the same on a terminal, in a log and in the test that freezes it.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
_DEBUG = "--debug"


@app.callback(invoke_without_command=True)
def llamahome(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show tracebacks of errors; may stand anywhere.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA: conversations in, adapters out.

    Exit codes: 0 done, 1 for you to fix or a failed job, 2 usage or an extra not installed,
    3 something does not answer, 4 ours, 130 Ctrl-C.
    """
    if version:
        put(importlib.metadata.version("llamahome"))
    elif context.invoked_subcommand is None:
        put(context.get_help())


app.command("up")(machine.up)
app.command("demo")(machine.demo)
app.command("train")(train.train)
app.command("submit")(jobs.submit)
app.command("validate")(data.validate)
app.command("inspect")(data.inspect)
app.command("jobs")(jobs.list_jobs)
app.command("show")(jobs.show)
app.command("watch")(jobs.watch)
app.command("cancel")(jobs.cancel)
app.command("pause")(jobs.pause)
app.command("resume")(jobs.resume)
app.command("retry")(jobs.retry)
app.command("fetch")(jobs.fetch)
app.add_typer(models.app, name="models")
app.command("recipes")(fleet.recipes)
app.command("ps")(fleet.ps)
app.command("doctor")(machine.doctor)
app.command("health")(fleet.health)
app.add_typer(fleet.keys, name="keys")
app.add_typer(fleet.ledger, name="ledger")
app.command("worker")(processes.worker)
app.command("coordinator")(processes.coordinator)
app.command("gateway")(processes.gateway)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are shown as :mod:`exits` says."""
    words, debug = _take_debug(arguments)
    _print_anything()
    try:
        code = app(args=words, prog_name="llamahome", standalone_mode=False, obj=words)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug=debug, stderr_is_log=words[:1] in processes.COMMANDS)
    return code if isinstance(code, int) else 0


def _print_anything() -> None:
    """Characters that the encoding of stdout does not have are written as escapes, which stderr
    does by itself: rows and file names may hold any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Without ``--debug``, wherever it stood before ``--``; and whether tracebacks are wanted."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word != _DEBUG]
    wanted = len(options) < end or os.environ.get("LLAMAHOME_LOG_LEVEL") == "debug"
    return options + words[end:], wanted
