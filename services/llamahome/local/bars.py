"""How far a call is: rich bars on a terminal, log lines off one."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from llamahome.config import TrainingConfig
from llamahome.local.watch import Watch
from llamahome.schemas import NewEvent, Stage, StopReason

if TYPE_CHECKING:
    from llamahome.local.callback import ProgressCallback

_log = logging.getLogger("llamahome.local")
_ROWS_SHOWN = 5
_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def progress_console() -> Console:
    return Console(stderr=True)


def new_progress() -> Progress:
    """SPEC's four columns; it draws nothing off a terminal."""
    console = progress_console()
    return Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal or console.is_jupyter),
    )


class SampleBars:
    """The bars of ``process_samples``: files read, and rows made into tokens."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.progress = new_progress()
        self._load = self.progress.add_task("Loading samples...", total=len(files))
        self._rows = self.progress.add_task("Tokenizing...", total=None, visible=False)

    def watch(self, should_stop: Callable[[], StopReason | None]) -> Watch:
        return Watch(event=log_event, progress=self._progress, should_stop=should_stop)

    def file_done(self, done: int) -> None:
        self.progress.update(self._load, completed=done)
        _log.info("Loading samples: %d of %g files", done, self.progress.tasks[0].total)

    def _progress(
        self, stage: Stage, done: int, total: int | None, data: Mapping[str, Any]
    ) -> None:
        if stage is Stage.preprocessing:
            self.progress.update(self._rows, completed=done, total=total, visible=True)


@contextlib.contextmanager
def training_watch(
    config: TrainingConfig, should_stop: Callable[[], StopReason | None]
) -> Iterator[Watch]:
    """For ``train_model``: on a terminal a ProgressCallback is told how far the engine's process
    is. Off one, each log line says it."""
    console = progress_console()
    if not (console.is_terminal or console.is_jupyter):
        yield Watch(event=log_event, should_stop=should_stop)
        return
    from llamahome.local.callback import ProgressCallback

    with ProgressCallback() as callback:
        relay = CallbackRelay(callback, config)
        yield Watch(event=log_event, progress=relay.progress, should_stop=should_stop)
        relay.end()


class CallbackRelay:
    """A training in another process, as a TrainerCallback in this one sees it.

    ``progress`` gives optimizer steps done and in all; steps of an epoch are all/epochs.
    """

    def __init__(self, callback: ProgressCallback, config: TrainingConfig) -> None:
        from transformers import TrainerControl, TrainerState

        self._callback = callback
        self._args = types.SimpleNamespace(
            gradient_accumulation_steps=config.gradient_accumulation_steps
        )
        self._control: Any = TrainerControl()
        self.state: Any = TrainerState(num_train_epochs=config.epochs, max_steps=0)
        self._began = False

    def progress(self, stage: Stage, done: int, total: int | None, data: Mapping[str, Any]) -> None:
        if stage is not Stage.training or total is None:
            return
        per_epoch = max(total // self.state.num_train_epochs, 1)
        if not self._began or done < self.state.global_step:  # an engine that was started again
            self._began = True
            self.state.max_steps, self.state.global_step = total, done
            self._tell("on_train_begin")
            self._tell("on_epoch_begin")
        while self.state.global_step < done:
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / per_epoch
            self._tell("on_step_end")
            if self.state.global_step % per_epoch == 0:
                self._tell("on_epoch_end")
                if self.state.global_step < total:
                    self._tell("on_epoch_begin")
        if data.get("loss") is not None:
            self._tell("on_log", logs=dict(data))

    def end(self) -> None:
        """It ended well, all steps taken or not. Otherwise the callback is only closed."""
        if self._began:
            self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        getattr(self._callback, event)(self._args, self.state, self._control, **more)


def log_event(stage: Stage, event: NewEvent) -> None:
    """The message, and below it the first of the rows that it is about."""
    rows = event.data.get("rows")
    shown = rows[:_ROWS_SHOWN] if isinstance(rows, list) else []
    lines = [event.message, *(f"{row['file']}:{row['line']}: {row['reason']}" for row in shown)]
    level = _LEVELS.get(event.level, logging.INFO)
    _log.log(level, "%s: %s", stage.value, "\n  ".join(lines))
