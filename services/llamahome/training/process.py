"""The engine as its supervisor holds it: start, talk, kill. No torch here.

A fresh process, because CUDA cannot be used again after a fork; in its own session, so that it and
whatever it starts can be killed as one group; without the secrets of the process that starts it.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamahome.errors import WorkerLost
from llamahome.training.wire import (
    Admit,
    Channel,
    FromEngine,
    Message,
    Quit,
    Ready,
    Stop,
    Stored,
    ToEngine,
)

# -P: nothing that lies in the working folder may shadow a module.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "llamahome.training.engine")
START_SECONDS = 180.0  # imports from a cold disk, at their slowest
_QUIT_SECONDS = 3.0
_POLL_SECONDS = 0.2
_TAIL_BYTES = 2000

# What the engine inherits; anything not named here (URLs, keys, tokens) stays behind.
_KEPT = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH",
        "LD_PRELOAD", "VIRTUAL_ENV", "SSL_CERT_FILE", "LLAMAHOME_CRASH_AT",
    }
)  # fmt: skip
_KEPT_PREFIXES = (
    "LC_", "PYTHON", "CUDA_", "NVIDIA_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "KMP_", "GOMP_",
    "MKL_", "OPENBLAS_", "LLAMAHOME_TEST_",
)  # fmt: skip


def engine_environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The engine's environment: an allow-list of ``environ``, and what makes runs repeatable."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    count = str(threads or len(os.sched_getaffinity(0)))
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A library that picks its own number of threads changes the order of sums.
        "OMP_NUM_THREADS": count,
        "OMP_DYNAMIC": "FALSE",
        "MKL_NUM_THREADS": count,
        "MKL_DYNAMIC": "FALSE",
        # Threads that spin at a barrier beside busy neighbours: ten steps of a small job took 43
        # CPU seconds on two threads, 7 with waiting ones, 5 on one thread alone.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS repeats itself in a fixed workspace
    }


class Line:
    """One job's side of the talk with an engine. For one thread."""

    def __init__(self, engine: EngineProcess, job: str) -> None:
        self.engine, self.job = engine, job
        self.leaving = False  # nobody wants the job any more; set under the engine's lock
        self._heard: queue.SimpleQueue[FromEngine | WorkerLost] = queue.SimpleQueue()

    def put(self, message: FromEngine | WorkerLost) -> None:
        self._heard.put(message)

    def send(self, message: ToEngine) -> None:
        """Raises WorkerLost where the engine is gone."""
        self.engine.send(message)

    def receive(self, timeout_seconds: float) -> FromEngine | None:
        """The next message about the job, or None in time. Raises WorkerLost."""
        try:
            message = self._heard.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(message, WorkerLost):
            self._heard.put(message)  # for whoever asks again
            raise message
        return message

    def leave(self) -> None:
        """From now on the job is no reason to keep the engine."""
        self.engine.leave(self)

    def close(self) -> None:
        """Hear no more of the job."""
        self.engine.forget(self.job)


class EngineProcess:
    """One engine. ``owner`` is the process that may use it: a fork's copy must not.

    It dies with the thread that starts it: the parent-death signal is the thread's, not the
    process's (prctl(2)).
    """

    def __init__(
        self, scratch_root: Path, threads: int, command: Sequence[str] = ENGINE_COMMAND
    ) -> None:
        """Start it; see :meth:`ready`. ``threads`` 0 is every core. Raises OSError.

        ``command`` is given ``--channel`` (an inherited socket) and ``--parent`` (a process id).
        """
        scratch_root.mkdir(parents=True, exist_ok=True)
        self.owner = os.getpid()
        # No name in the file system: whoever dies, nothing is left behind.
        self._log = tempfile.TemporaryFile(dir=scratch_root, prefix="engine-log-")
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [*command, "--channel", str(theirs.fileno()), "--parent", str(self.owner)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd="/",  # attempts' folders come and go
            env=engine_environment(os.environ, threads),
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        self._channel = Channel(ours)
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._lines: dict[str, Line] = {}
        self._lost: WorkerLost | None = None
        self._killed = False
        self.heard_at = time.monotonic()
        self._listener = threading.Thread(target=self._listen, name="engine", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """False also for one whose channel is closed: it is of no use."""
        return self._lost is None and self._process.poll() is None

    def ready(self) -> bool:
        """Wait a moment for it to come up. Raises WorkerLost where it will not."""
        up = self._ready.wait(_POLL_SECONDS)
        if self._lost is not None:
            raise self._lost
        return up

    def line(self, job: str) -> Line:
        """From now on what the engine says of ``job`` is heard there. Raises WorkerLost."""
        line = Line(self, job)
        with self._lock:
            if self._lost is not None:
                raise self._lost
            assert job not in self._lines, f"job {job} is on this engine already"
            self._lines[job] = line
        return line

    def forget(self, job: str) -> None:
        with self._lock:
            self._lines.pop(job, None)

    def leave(self, line: Line) -> None:
        with self._lock:
            line.leaving = True

    def wanted(self) -> bool:
        """Whether any job is on it that is not about to leave."""
        with self._lock:
            return any(not line.leaving for line in self._lines.values())

    def send(self, message: Message) -> None:
        """Raises WorkerLost where it is gone."""
        try:
            self._channel.send(message)
        except OSError as error:
            self._listener.join(_QUIT_SECONDS)
            raise self._lost or WorkerLost(f"the engine closed its channel: {error}") from error

    def _listen(self) -> None:
        """Hand each message to the line of its job, until there are no more."""
        try:
            while True:
                message = self._channel.receive(None)
                self.heard_at = time.monotonic()
                if isinstance(message, Ready):
                    self._ready.set()
                elif isinstance(message, Admit | Stop | Stored | Quit) or message is None:
                    raise ValueError(f"{message} is nothing that an engine says")
                else:
                    with self._lock:
                        line = self._lines.get(message.job)
                    if line is not None:
                        line.put(message)
        except (EOFError, OSError):
            self._fail(f"the engine {self._how()}{self.tail()}")
        except ValueError as error:
            self._kill_group()
            self._fail(f"the engine sent no message: {error}{self.tail()}")

    def _fail(self, why: str) -> None:
        with self._lock:
            self._lost = WorkerLost(why)
            for line in self._lines.values():
                line.put(self._lost)
        self._ready.set()

    def _how(self) -> str:
        try:
            self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill_group()
            return "closed its channel"
        return self.exit()

    def exit(self) -> str:
        """How it ended, in words."""
        code = self._process.poll()
        if code is None:
            return "is running"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit status {code}"

    def tail(self) -> str:
        """The end of what it wrote to stdout and stderr, for an error's text."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        shown = text.decode(errors="replace").strip()
        return f"; its last output:\n{shown}" if shown else ""

    def forget_log(self) -> None:
        """Drop what earlier jobs wrote, so that a warm engine's log does not grow for ever."""
        os.lseek(self._log.fileno(), 0, os.SEEK_SET)
        os.ftruncate(self._log.fileno(), 0)

    def kill(self) -> None:
        """SIGKILL to its whole group, now. Harmless to repeat."""
        self._kill_group()
        self._process.wait()
        self._listener.join()  # nobody may be reading a socket that is closed
        self._channel.close()

    def _kill_group(self) -> None:
        with self._lock:
            if self._killed:
                return  # the group's number may be somebody else's by now
            self._killed = True
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it and its group are gone

    def close(self) -> None:
        """Ask it to end, and see to it that it does."""
        if self.alive():
            try:
                self._channel.send(Quit())
                self._process.wait(_QUIT_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                pass  # killed below
        self.kill()
        self._log.close()

    def disown(self) -> None:
        """In a forked copy: let go of the files without touching the process."""
        self._channel.close()
        self._log.close()
