"""`llamahome up`: a whole fleet on one machine, in the foreground.

Its order: lock the state folder, private Redis (unless one is configured), ledger schema, a first
base, the processes, and `ready` once each of them is alive in the ledger and the gateway answers.
Then it restarts what dies. Asked to end, it lets the workers drain, ends Redis last and leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llamahome.cli import bases, redis
from llamahome.cli.children import (
    DEATHS_LIMIT,
    DEATHS_WINDOW_SECONDS,
    Child,
    Stops,
    adopt_orphans,
    end_all,
    kill_orphans,
    reap,
)
from llamahome.cli.context import Endpoint, read_endpoint, write_endpoint
from llamahome.cli.exits import missing_modules, require
from llamahome.cli.health import is_well
from llamahome.cli.lock import StateLock, locked
from llamahome.cli.output import duration, put, say
from llamahome.cli.places import gateway_address, private_folder
from llamahome.cli.processes import fleet_commands
from llamahome.config import Settings, private_redis_socket
from llamahome.errors import OperatorError, Unauthenticated, Unavailable
from llamahome.ledger import Ledger

TENANT = "default"
FIRST_BASE = "tiny"
START_SECONDS = 60.0
DRAIN_SECONDS = 25.0
REDIS_END_SECONDS = 3.0
_POLL_SECONDS = 0.2
_TAIL_LINES = 20
# All of them share this machine's cores. OpenMP threads that spin while they wait for one another
# made two threads of a busy 2-core machine 4 times slower than one; sleeping ones do not.
_SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}
_FOR_CLIENTS_ONLY = frozenset({"LLAMAHOME_URL", "LLAMAHOME_KEY"})


class _Asked(Exception):
    """Somebody asked `up` to end, which is no failure."""


def up(settings: Settings, *, preprocessing: int) -> int:
    """Run the fleet of ``settings.state`` until asked to end; ``preprocessing`` is its processes.

    Returns the exit code. Raises InvalidState when a fleet already runs there, OperatorError when a
    process dies DEATHS_LIMIT times in a minute, or once before the fleet is ready.
    """
    require("fleet")
    require("gateway")
    assert settings.state is not None, "the command chooses the folder"
    state = private_folder(settings.state.resolve())
    with locked(state) as lock, Stops().listening() as stops:
        adopt_orphans()
        fleet = _Fleet(settings, state, lock, stops, preprocessing)
        with contextlib.suppress(_Asked), fleet.ended_at_exit():
            fleet.start()
            fleet.watch()
    say("stopped")
    return 0


class _Fleet:
    """The processes of one state folder."""

    def __init__(
        self, settings: Settings, state: Path, lock: StateLock, stops: Stops, preprocessing: int
    ) -> None:
        self._settings = settings
        self._state = state
        self._lock = lock
        self._stops = stops
        self._preprocessing = preprocessing
        self._host, self._port = gateway_address(settings)
        self._url = f"http://{self._host}:{self._port}"
        self._endpoint_file = state / "endpoint.json"
        self._logs = state / "logs"
        self._redis: Child | None = None
        self._children: list[Child] = []

    def start(self) -> None:
        """Everything up to `ready`. Raises OperatorError, Unavailable, _Asked."""
        for folder in (self._logs, self._state / "bases"):
            folder.mkdir(exist_ok=True)
        say(f"state folder {self._state}")
        self._start_redis()
        with contextlib.closing(Ledger(self._settings.ledger)) as ledger:
            ledger.upgrade()
            self._register_first_base(ledger)
            self._start_processes()
            self._until(lambda: self._ready(ledger), "the fleet")
            key = self._key(ledger)
        self._lock.announce(self._url)
        write_endpoint(self._endpoint_file, Endpoint(self._url, key, os.getpid()))
        put(f"ready {self._url}")

    def watch(self) -> None:
        """Start again what dies, until asked to end. Raises _Asked, OperatorError."""
        while True:
            due = [child.due_at for child in self._all if child.due_at is not None]
            self._pause(min(due) - time.monotonic() if due else 3600.0)
            for child, code in reap(self._all):
                self._start_again_later(child, _how(code))
            for child in self._all:
                if child.due_at is not None and child.due_at <= time.monotonic():
                    self._start_again(child)

    @contextlib.contextmanager
    def ended_at_exit(self) -> Iterator[None]:
        """Whatever happens inside, nothing of the fleet is left afterwards."""
        try:
            yield
        finally:
            self._endpoint_file.unlink(missing_ok=True)
            self._end()

    @property
    def _all(self) -> list[Child]:
        return [*self._children, *([self._redis] if self._redis else [])]

    def _start_redis(self) -> None:
        if self._settings.redis_url is not None:
            say("redis: the server of LLAMAHOME_REDIS_URL")
            return
        server = redis.find_server()
        path = private_redis_socket(self._state)
        redis.prepare_socket(path)
        folder = self._state / "redis"
        folder.mkdir(exist_ok=True)
        command = redis.server_command(server, socket=path, folder=folder)
        # SIGTERM, so that it writes its append-only file out when it is we who are killed.
        self._redis = self._child("redis", command, parent_death_signal=signal.SIGTERM)
        self._redis.start()
        self._until(lambda: redis.answers(path), "Redis")
        say(f"redis: {server.path} ({server.origin}) on {path}")

    def _register_first_base(self, ledger: Ledger) -> None:
        if ledger.bases():
            return
        if missing := missing_modules("training"):
            say(f"no base is registered, and without {missing[0]} a tiny one cannot be made")
            return
        folder = self._state / "bases" / FIRST_BASE
        if not folder.is_dir():
            say("no base is registered: making a tiny one, which takes some seconds")
            self._run_to_end(self._llamahome("make-tiny", "models", "make-tiny", str(folder)))
        bases.check_base(folder)
        ledger.add_base(FIRST_BASE, str(folder), bases.base_digest(folder))
        say(f"base {FIRST_BASE} registered: {folder}")

    def _start_processes(self) -> None:
        commands = fleet_commands(preprocessing=self._preprocessing)
        if missing := missing_modules("training"):
            say(f"no training worker: {', '.join(missing)} not installed (the training extra)")
            del commands["training"]
        self._children = [self._llamahome(name, *words) for name, words in commands.items()]
        for child in self._children:
            child.start()
        say(f"started {', '.join(commands)}; their logs are in {self._logs}")

    def _ready(self, ledger: Ledger) -> bool:
        here = [w for w in ledger.workers(alive_only=True) if w.host == self._settings.host]
        # A pool's rows are of its children, which name their main process.
        alive = {worker.pid for worker in here} | {worker.info.get("main_pid") for worker in here}
        return all(child.pid in alive for child in self._children) and is_well(
            f"{self._url}/healthz"
        )

    def _key(self, ledger: Ledger) -> str:
        """The key of an endpoint file that was left behind, while it is valid; else a new one."""
        before = read_endpoint(self._endpoint_file)
        if before is not None:
            with contextlib.suppress(Unauthenticated):  # of a ledger that was removed
                if ledger.tenant_of(before.key) == TENANT:
                    return before.key
        return ledger.create_key(TENANT).key

    def _llamahome(self, name: str, *words: str) -> Child:
        # -P: a file of the working folder must not stand in for a module of ours.
        return self._child(name, [sys.executable, "-P", "-m", "llamahome.cli", *words])

    def _child(
        self, name: str, command: list[str], parent_death_signal: signal.Signals = signal.SIGKILL
    ) -> Child:
        passed = {k: v for k, v in os.environ.items() if k not in _FOR_CLIENTS_ONLY}
        # One port cannot serve seven processes; a fixed one is the coordinator's, which lists all.
        metrics_port = self._settings.metrics_port if name == "coordinator" else 0
        environ = (
            _SHARED_CORES
            | passed
            | {
                "LLAMAHOME_STATE": str(self._state),
                "LLAMAHOME_GATEWAY_PORT": str(self._port),
                "LLAMAHOME_METRICS_PORT": str(metrics_port),
            }
        )
        child = Child(
            name, command, log=self._logs / f"{name}.log", environ=environ,
            parent_death_signal=parent_death_signal,
        )  # fmt: skip
        child.rotate_log()
        return child

    def _run_to_end(self, child: Child) -> None:
        child.start()
        self._children = [child]  # so that it is ended with the rest if we are asked to
        while child.pid is not None:
            self._pause(START_SECONDS)
            for ended, code in reap(self._all):
                if ended is not child or code != 0:
                    raise self._death(ended, f"ended ({_how(code)})")
        self._children = []

    def _until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for ``done``; a process that ends meanwhile ends it all."""
        deadline = time.monotonic() + START_SECONDS
        while not done():
            self._pause(_POLL_SECONDS)
            for child, code in reap(self._all):
                raise self._death(child, f"ended during the start ({_how(code)})")
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{what} is not ready after {START_SECONDS:.0f} s",
                    file=str(self._logs), remedy="Look at the logs there",
                )  # fmt: skip

    def _start_again(self, child: Child) -> None:
        try:
            child.start()
        except OSError as error:  # no memory or no more processes, for now
            self._start_again_later(child, f"cannot be started: {error}")

    def _start_again_later(self, child: Child, how: str) -> None:
        kill_orphans(self._all)  # what it has left behind
        child.died()
        if child.hopeless:
            window = f"{DEATHS_WINDOW_SECONDS:.0f} s"
            raise self._death(child, f"ended {DEATHS_LIMIT} times within {window}, last: {how}")
        assert child.due_at is not None
        wait = duration(child.due_at - time.monotonic())
        say(f"{child.name} ended ({how}); starting it again in {wait}, its log: {child.log}")

    def _death(self, child: Child, how: str) -> OperatorError:
        for line in child.log_tail(_TAIL_LINES):
            say(f"  {child.name}: {line}")
        return OperatorError(f"{child.name} {how}", file=str(child.log), code="process_ended")

    def _pause(self, seconds: float) -> None:
        """Until something happens or the seconds are over. Raises _Asked."""
        if not self._stops.count:
            self._stops.wait(seconds)
        if self._stops.count:
            raise _Asked

    def _end(self) -> None:
        at_once = self._stops.count + 1
        running = [child for child in self._children if child.pid is not None]
        if running:
            say("stopping: workers hand back what they hold (once more Ctrl-C: at once)")
        self._end_these(self._children, DRAIN_SECONDS, at_once)
        kill_orphans(self._all)
        if self._redis is not None:
            self._end_these([self._redis], REDIS_END_SECONDS, at_once)
            private_redis_socket(self._state).unlink(missing_ok=True)

    def _end_these(self, children: list[Child], seconds: float, stops_limit: int) -> None:
        among = self._all
        end_all(children, self._stops, among=among, seconds=seconds, stops_limit=stops_limit)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
