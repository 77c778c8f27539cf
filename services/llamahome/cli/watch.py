"""Following a job until it ends: a live table on a terminal, plain lines off one.

Watching is reading only. It can begin and end at any time, and Ctrl-C ends the watching, never the
job.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llamahome.cli.context import command_line
from llamahome.cli.exits import INTERRUPTED, USER, one_line
from llamahome.cli.output import put_json, rich_table, say
from llamahome.cli.progress import (
    STAGE_COLUMNS,
    Eta,
    event_line,
    headline,
    stage_rows,
    worth_telling,
)
from llamahome.client import Client, EventInfo, JobInfo
from llamahome.errors import TransientError
from llamahome.schemas import JobState, Run

POLL_SECONDS = 1.0
QUIET_SECONDS = 10.0
GIVE_UP_SECONDS = 60.0
# A job of thousands of shards has a list of runs that is not worth asking for every second.
SECONDS_PER_RUN = 0.01
_EVENTS_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Update:
    """One look at a job; ``events`` are the new ones, oldest first."""

    job: JobInfo
    runs: list[Run]
    events: list[EventInfo]


class Display(Protocol):
    """Where updates go. A context manager, so that a terminal is always given back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, update: Update) -> None: ...

    def note(self, text: str) -> None: ...


def follow(
    client: Client,
    job_id: str,
    display: Display,
    *,
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> JobInfo:
    """Show ``job_id`` until it has ended, and return it.

    A gateway that is away for less than GIVE_UP_SECONDS is waited for.
    Raises NotFound, Unavailable.
    """
    last: Update | None = None
    last_event: str | None = None
    answered_at = runs_at = clock()
    while True:
        try:
            job = client.job(job_id)
            # Read after the job, so that an ended one comes with its last runs and events.
            if last is None or job.state is not last.job.state or clock() >= runs_at:
                runs = client.runs(job_id)
                runs_at = clock() + len(runs) * SECONDS_PER_RUN
            update = Update(job, runs, client.events(job_id, after=last_event))
        except TransientError as error:
            if clock() - answered_at > GIVE_UP_SECONDS:
                raise
            display.note(f"{one_line(str(error))} (trying again; the job is not affected)")
        else:
            last, answered_at = update, clock()
            if update.events:
                last_event = update.events[-1].id
            display.show(update)
            if job.terminal:
                return job
        pause(POLL_SECONDS)


def watch(
    client: Client,
    job_id: str,
    *,
    state: Path | None,
    stream: TextIO | None = None,
    as_json: bool = False,
) -> int:
    """Follow a job on ``stream`` (stdout unless given); returns the exit code.

    0 only if it succeeded, 1 if it ended otherwise, 130 after Ctrl-C, which leaves the job alone.
    ``state`` is the folder that was named, for the commands that are suggested.
    """
    try:
        with display_for(stream or sys.stdout, as_json=as_json) as display:
            job = follow(client, job_id, display)
    except KeyboardInterrupt:
        say(
            f"job {job_id} goes on: {command_line(f'watch {job_id}', state)} looks again, "
            f"{command_line(f'cancel {job_id}', state)} ends it"
        )
        return INTERRUPTED
    return 0 if job.state is JobState.succeeded else USER


def display_for(stream: TextIO, *, as_json: bool = False) -> Display:
    if as_json:
        return JsonDisplay()
    return LiveDisplay(stream) if stream.isatty() else PlainDisplay(stream)


class _Display:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class LiveDisplay(_Display):
    """A table that is drawn again in place, the training line and the last events below it."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream)
        # No refresh thread: it is drawn once a look, and a signal finds one thread only.
        self._live = Live(console=console, auto_refresh=False)
        self._eta = Eta()
        self._events: collections.deque[str] = collections.deque(maxlen=_EVENTS_SHOWN)
        self._last: Update | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, update: Update) -> None:
        self._last = update
        told = filter(worth_telling, update.events)
        self._events.extend(one_line(event_line(event)) for event in told)
        self._draw("")

    def note(self, text: str) -> None:
        self._draw(text)

    def _draw(self, note: str) -> None:
        parts: list[Text | Group] = []
        if self._last is not None:
            job = self._last.job
            left = self._eta.left(job, time.monotonic())
            state = f"{job.id}  {job.model}  {job.state.value}"
            line = one_line(headline(job, self._last.runs, left))
            table = rich_table(STAGE_COLUMNS, stage_rows(job, self._last.runs))
            parts += [Text(state, style="bold"), Group(table), Text(line)]
        parts += [Text(line, style="dim") for line in self._events]
        if note:
            parts.append(Text(note, style="yellow"))
        self._live.update(Group(*parts), refresh=True)


class PlainDisplay(_Display):
    """A line when the state changes, at most one in QUIET_SECONDS while only numbers do.

    Events are told as they come, but for each step's metrics, which the progress lines carry.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._eta = Eta()
        self._state: JobState | None = None
        self._facts = ""
        self._told_at = 0.0

    def show(self, update: Update) -> None:
        for event in filter(worth_telling, update.events):
            self._tell(event_line(event))
        job, now = update.job, self._clock()
        left = self._eta.left(job, now)
        facts = headline(job, update.runs)  # without the ETA, which changes by itself
        due = facts != self._facts and now - self._told_at >= QUIET_SECONDS
        if job.state is not self._state or due:
            line = headline(job, update.runs, left)
            clock = time.strftime("%H:%M:%S")
            self._tell(f"{clock}  {job.id} {job.state.value}{': ' if line else ''}{line}")
            self._state, self._facts, self._told_at = job.state, facts, now

    def note(self, text: str) -> None:
        self._tell(f"{time.strftime('%H:%M:%S')}  {text}")

    def _tell(self, text: str) -> None:
        print(one_line(text), file=self._stream, flush=True)


class JsonDisplay(_Display):
    """One JSON object a line on stdout: at first, and when the job or its events changed."""

    def __init__(self) -> None:
        self._job: JobInfo | None = None

    def show(self, update: Update) -> None:
        if update.events or update.job != self._job:
            self._job = update.job
            put_json({"job": update.job, "events": update.events})

    def note(self, text: str) -> None:
        say(text)
