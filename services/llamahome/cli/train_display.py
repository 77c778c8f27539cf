"""How far `llamahome train` is: a bar on a terminal, plain lines off one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from llamahome.cli.exits import one_line
from llamahome.cli.output import number, share, size
from llamahome.schemas import NewEvent, Stage

QUIET_SECONDS = 10.0
ROWS_SHOWN = 5


class Display(Protocol):
    """A context manager, so that a terminal is always given back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def event(self, stage: Stage, event: NewEvent) -> None: ...

    def progress(
        self, stage: Stage, done: int, total: int | None, data: Mapping[str, Any]
    ) -> None: ...


def display_for(stream: TextIO) -> Display:
    return BarDisplay(stream) if stream.isatty() else PlainDisplay(stream)


class BarDisplay:
    """One bar for the stage at work, and the events above it."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._stage: Stage | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def event(self, stage: Stage, event: NewEvent) -> None:
        if _worth_telling(event):
            style = {"warn": "yellow", "error": "red"}.get(event.level, "dim")
            for line in _lines(event):
                self._console.print(Text(line, style=style))

    def progress(self, stage: Stage, done: int, total: int | None, data: Mapping[str, Any]) -> None:
        if self._task is None or stage is not self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage = stage
            self._task = self._bar.add_task(stage.value, total=total, figures="")
        self._bar.update(self._task, completed=done, total=total, figures=_figures(data))


class PlainDisplay:
    """Events as they come; a line of figures at most every QUIET_SECONDS."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._told_at = clock()
        self._told: tuple[Stage, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def event(self, stage: Stage, event: NewEvent) -> None:
        if _worth_telling(event):
            level = "" if event.level == "info" else f"{event.level}: "
            for line in _lines(event):
                self._tell(f"{stage.value}: {level}{line}")

    def progress(self, stage: Stage, done: int, total: int | None, data: Mapping[str, Any]) -> None:
        now = self._clock()
        if (stage, done) == self._told or now - self._told_at < QUIET_SECONDS:
            return
        self._told, self._told_at = (stage, done), now
        of = f"{done}/{total} ({share(done, total)})" if total else str(done)
        self._tell(f"{stage.value}: {of}  {_figures(data)}".rstrip())

    def _tell(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _worth_telling(event: NewEvent) -> bool:
    """Whether the progress does not say it already, as it does each step's metrics."""
    return event.kind != "metrics" or "eval_loss" in event.data


def _lines(event: NewEvent) -> list[str]:
    """The message, and below it the first of the rows that it is about."""
    rows = event.data.get("rows")
    shown = rows[:ROWS_SHOWN] if isinstance(rows, list) else []
    places = [f"{row['file']}:{row['line']}: {row['reason']}" for row in shown]
    return [one_line(line) for line in (event.message, *places)]


def _figures(data: Mapping[str, Any]) -> str:
    shown = [
        (name, number(data.get(key), digits))
        for name, key, digits in (
            ("loss", "loss", 4), ("eval loss", "eval_loss", 4), ("lr", "learning_rate", 3),
            ("tok/s", "tokens_per_second", 4), ("MFU", "mfu", 2),
        )
        if data.get(key) is not None
    ]  # fmt: skip
    if data.get("peak_memory_bytes"):
        shown.append(("memory", size(data["peak_memory_bytes"])))
    return "  ".join(f"{name} {value}" for name, value in shown)
