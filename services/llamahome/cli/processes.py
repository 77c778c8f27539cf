"""Commands that are one process of a fleet. Each runs until SIGTERM, which means drain."""

from __future__ import annotations

import enum
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli.context import State
from llamahome.cli.exits import require

if TYPE_CHECKING:
    from types import ModuleType

    from llamahome.config import Settings


# Their stderr is a log, kept by whoever runs them.
COMMANDS = (["worker"], ["coordinator"], ["gateway"])


class Role(enum.StrEnum):
    """What a worker works on."""

    validation = "validation"
    preprocessing = "preprocessing"
    training = "training"
    submissions = "submissions"


def worker(
    role: Annotated[Role, typer.Argument(metavar="ROLE", help="One of the four queues.")],
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pool processes (training has one engine).")
    ] = 1,
    state: State = None,
) -> None:
    """Run a worker of one queue.

    ROLE is validation, preprocessing, training or submissions. SIGTERM drains it.
    """
    require("training" if role is Role.training else "fleet")
    module = "queueing.submissions" if role is Role.submissions else f"{role.value}.worker"
    raise typer.Exit(_module(f"llamahome.{module}").main(_settings(state), concurrency))


def coordinator(state: State = None) -> None:
    """Run the clockwork: sweeper, retention, exporter.

    Any number of copies may run.
    """
    require("fleet")
    raise typer.Exit(_module("llamahome.coordinator.worker").main(_settings(state)))


def gateway(state: State = None) -> None:
    """Serve the HTTP API.

    It listens on LLAMAHOME_GATEWAY_HOST and LLAMAHOME_GATEWAY_PORT.
    """
    require("gateway")
    raise typer.Exit(_module("llamahome.gateway.worker").main(_settings(state)))


def fleet_commands(*, preprocessing: int) -> dict[str, tuple[str, ...]]:
    """A whole fleet: its processes by name, each with the words of its command."""
    return {
        "coordinator": ("coordinator",),
        "gateway": ("gateway",),
        "validation": ("worker", "validation"),
        "preprocessing": ("worker", "preprocessing", "--concurrency", str(preprocessing)),
        "training": ("worker", "training"),
        "submissions": ("worker", "submissions"),
    }


def _settings(state: Path | None) -> Settings:
    from llamahome.config import load_settings

    return load_settings(state=state)


def _module(name: str) -> ModuleType:
    # Imported when it is run: one command must not pay for, or need, what the others import.
    return importlib.import_module(name)
