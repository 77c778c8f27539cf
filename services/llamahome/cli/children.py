"""The processes of one supervisor: started so that they cannot outlive it, watched, ended.

Every child leads a session of its own, so that a Ctrl-C at the terminal reaches the supervisor
alone, and asks the kernel for a signal at the supervisor's death (PR_SET_PDEATHSIG in prctl(2)),
so that not even `kill -9` of the supervisor leaves one behind. The supervisor is also a subreaper
(PR_SET_CHILD_SUBREAPER): what a killed child leaves below itself becomes our child and is ended.

All of it belongs to the main thread: a parent-death signal is tied to the thread that forked.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
DEATHS_WINDOW_SECONDS = 60.0
DEATHS_LIMIT = 5
_ORPHAN_ROUNDS = 5
LOG_BYTES = 16 * 1024 * 1024


class Child:
    """One program to keep running, and the process that runs it now."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environ: Mapping[str, str],
        parent_death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self._environ = dict(environ)
        self._parent_death_signal = parent_death_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._deaths: collections.deque[float] = collections.deque(maxlen=DEATHS_LIMIT)
        self._in_a_row = 0  # deaths without a life of DEATHS_WINDOW_SECONDS between
        self.due_at: float | None = None  # when to start it again, monotonic seconds

    @property
    def pid(self) -> int | None:
        """Of the running process; None while there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Raises OSError when the program cannot be started."""
        self.due_at = None
        self._started_at = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._environ, start_new_session=True,
                preexec_fn=end_with_parent(self._parent_death_signal),
            )  # fmt: skip

    def reap(self) -> int:
        """Collect the ended process and what is left of its group; its return code."""
        assert self._process is not None
        # Before the wait: until then nobody else can have the group's number.
        self.send_to_group(signal.SIGKILL)
        code = self._process.wait()
        self._process = None
        return code

    def died(self) -> None:
        """Count an unwanted death and set ``due_at`` by the backoff."""
        now = time.monotonic()
        self._deaths.append(now)
        if now - self._started_at > DEATHS_WINDOW_SECONDS:
            self._in_a_row = 0
        self._in_a_row += 1
        wait = min(FIRST_BACKOFF_SECONDS * 2.0 ** (self._in_a_row - 1), LONGEST_BACKOFF_SECONDS)
        self.due_at = now + wait

    @property
    def hopeless(self) -> bool:
        """Whether it died DEATHS_LIMIT times within DEATHS_WINDOW_SECONDS."""
        deaths = self._deaths
        return len(deaths) == DEATHS_LIMIT and deaths[-1] - deaths[0] < DEATHS_WINDOW_SECONDS

    def send(self, number: signal.Signals) -> None:
        """To the main process alone: a pool child must hear of a drain from its parent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now; reap() will tell
                os.kill(self._process.pid, number)

    def send_to_group(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # as above
                os.killpg(self._process.pid, number)

    def rotate_log(self) -> None:
        """Set a log that has grown past LOG_BYTES aside, replacing the one set aside before."""
        if self.log.is_file() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of its log, as far as 16 KiB reach."""
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 16 * 1024))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]


class Stops:
    """Counts the requests to end (SIGINT, SIGTERM, SIGHUP) and wakes :meth:`wait`.

    SIGCHLD wakes it too, so that a child's death is seen at once.
    """

    def __init__(self) -> None:
        self.count = 0
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wait(self, seconds: float) -> None:
        """Return at the next signal, or after ``seconds``."""
        readable, _, _ = select.select([self._read], [], [], max(0.0, seconds))
        if readable:
            os.read(self._read, 4096)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stops]:
        """Take the signals over for a while (main thread only)."""
        stops = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup wants us to stay
            stops.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in stops}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._read)
            os.close(self._write)


def adopt_orphans() -> None:
    """Make this process the parent of whatever its descendants leave behind."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap(children: Iterable[Child]) -> list[tuple[Child, int]]:
    """Collect every process of ours that has ended; the children among them with return codes.

    ``children`` must be all there are: another one's end would be taken for an orphan's. A negative
    code is the number of the signal that ended it.
    """
    by_pid = {child.pid: child for child in children if child.pid is not None}
    ended: list[tuple[Child, int]] = []
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return ended
        if found is None:
            return ended
        if child := by_pid.get(found.si_pid):
            ended.append((child, child.reap()))
        else:
            os.waitpid(found.si_pid, 0)  # an adopted orphan


def end_all(
    children: Sequence[Child],
    stops: Stops,
    *,
    among: Sequence[Child],
    seconds: float,
    stops_limit: int,
) -> bool:
    """SIGTERM to each, and wait until all have ended; ``among`` is all there are.

    Returns False if some were left after ``seconds``, or once ``stops_limit`` requests to end were
    counted; their groups are then killed.
    """
    deadline = time.monotonic() + seconds
    for child in children:
        child.due_at = None
        child.send(signal.SIGTERM)
    while any(child.pid is not None for child in children):
        reap(among)
        left = deadline - time.monotonic()
        if left <= 0 or stops.count >= stops_limit:
            kill_all(children)
            return False
        if any(child.pid is not None for child in children):
            stops.wait(left)
    return True


def kill_all(children: Sequence[Child]) -> None:
    """SIGKILL to each child's group and collect it."""
    for child in children:
        child.send_to_group(signal.SIGKILL)
    for child in children:
        if child.pid is not None:
            child.reap()


def kill_orphans(children: Sequence[Child]) -> int:
    """End every process below this one that is neither a child nor below a child; how many.

    Call it when the children that could have left some are gone: a pool child and an engine lead
    sessions of their own, so the group's SIGKILL does not reach them.
    """
    killed = 0
    for _ in range(_ORPHAN_ROUNDS):  # ending one makes us the parent of those below it
        orphans = _orphans(children)
        if not orphans:
            break
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
                orphan.kill()
                killed += 1
        psutil.wait_procs(orphans, timeout=1.0)
    return killed


def _orphans(children: Sequence[Child]) -> list[psutil.Process]:
    ours = {child.pid for child in children}
    return [process for process in psutil.Process().children() if process.pid not in ours]


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For a ``preexec_fn``: have the kernel send ``number`` when this process dies.

    The caller must be the main thread, which is the one whose death counts.
    """
    parent = os.getpid()

    def before_exec() -> None:
        _prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before the request was made, so no signal will come
            os._exit(1)

    return before_exec


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
