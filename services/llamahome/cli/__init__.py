"""The ``llamahome`` command.

This module needs the standard library only, so that a light install (the client alone) can still
say which extra the command line is in. ``llamahome.cli.app:app`` is the typer application.
"""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """The console script. Returns the exit code: see :mod:`llamahome.cli.exits`."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {' and '.join(missing)}. "
            "Install the fleet extra: pip install 'llamahome[fleet]'",
            file=sys.stderr,
        )
        return 2
    from llamahome.cli.app import run

    return run(sys.argv[1:])
