"""Where a fleet of one machine lives: its folder and its address."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

from llamahome.cli.lock import LOCK_NAME
from llamahome.cli.output import say
from llamahome.config import Settings
from llamahome.errors import InvalidConfig

# What shows that a folder was made for a fleet and for nothing else.
_OURS = (LOCK_NAME, "ledger.sqlite3")


def private_folder(state: Path) -> Path:
    """Make the state folder, or close it to others: keys and data are in it.

    A folder that holds other things is left as it is, for it may be somebody's home.
    Raises OSError.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not any(state.iterdir()) or any((state / name).exists() for name in _OURS):
        state.chmod(0o700)
    elif mode := stat.S_IMODE(state.stat().st_mode) & 0o077:
        say(f"others can read {state}, where keys and data will lie (mode {mode:04o} for them)")
    return state


def gateway_address(settings: Settings) -> tuple[str, int]:
    """Where clients of this machine reach the gateway; port 0 is made a free one.

    Raises InvalidConfig when the port is taken.
    """
    host, port = settings.gateway_host, settings.gateway_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway will
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidConfig(
                f"{host}:{port} cannot be listened on ({error.strerror})", field="--port",
                remedy="Name another port, or 0 for any free one",
            ) from None  # fmt: skip
        port = int(probe.getsockname()[1])
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return (f"[{reached}]" if ":" in reached and not reached.startswith("[") else reached), port
