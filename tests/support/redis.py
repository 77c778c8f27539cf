"""A real private Redis for a test, in the order the command line looks for one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from llamahome.cli.redis import find_server, prepare_socket, server_command
from llamahome.config import Settings
from llamahome.queueing.app import redis_client


@contextmanager
def private_redis(settings: Settings) -> Iterator[redis.Redis]:
    """Run a server on the state folder's socket; yields a client on it."""
    assert settings.state is not None
    socket = Path(settings.redis.removeprefix("redis+socket://"))
    prepare_socket(socket)
    folder = settings.state / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        server_command(find_server(), socket=socket, folder=folder), stdout=subprocess.DEVNULL
    )
    client = redis_client(settings)
    try:
        until = time.monotonic() + 10
        while not _answers(client):
            assert server.poll() is None, "redis-server ended"
            assert time.monotonic() < until, "redis-server does not answer"
        yield client
    finally:
        client.close()
        server.kill()
        server.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
