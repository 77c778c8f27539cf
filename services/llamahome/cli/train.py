"""`llamahome train`: an adapter from files, on this machine, with no fleet."""

from __future__ import annotations

import contextlib
import errno
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from llamahome.cli.bases import base_name
from llamahome.cli.context import Json, State, direct_settings, open_ledger
from llamahome.cli.data import Assignments
from llamahome.cli.exits import INTERRUPTED, USAGE, USER, EndedWith, require
from llamahome.cli.output import facts, number, put, put_json, say
from llamahome.errors import (
    LlamaHomeError,
    NotFound,
    Stopped,
    TrainingFailed,
    Unavailable,
    UserError,
)

if TYPE_CHECKING:
    from llamahome.config import Settings, TrainingConfig
    from llamahome.local import TrainedFiles
    from llamahome.schemas import BaseRef, StopReason

_TERMINATED = 128 + signal.SIGTERM


def train(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Training files.")],
    base: Annotated[str, typer.Option(metavar="NAME", help="A registered base, or its folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The adapter will be in DIR/adapter.")],
    validation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A validation file; repeatable.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="An earlier adapter to go on from.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR, if any.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="A recipe (see `recipes`).")
    ] = None,
    assignments: Assignments = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Train an adapter here, in the foreground, without a fleet.

    Exit code 0 when the adapter is there; 1 if the training failed or the disk is full; 2 if
    something given cannot be used or DIR is taken; 130 after Ctrl-C, which saves a checkpoint
    first.
    """
    require("fleet")
    require("training")
    from llamahome.cli.train_display import display_for
    from llamahome.local import Watch, train_files

    with _exit_codes():
        settings = direct_settings(state)
        config = _config(base_name(base), recipe, assignments, adapter)
        ref = _base(base, settings)
        stops = _Stops()
        try:
            with display_for(sys.stderr) as display, stops.listening():
                watch = Watch(display.event, display.progress, stops.reason)
                done = train_files(
                    files, ref, out, config=config, validation_files=validation or (),
                    adapter=adapter, resume=resume, settings=settings, watch=watch,
                )  # fmt: skip
        except Stopped as stopped:
            _say_stopped(stopped, out, context.obj, resume=resume)
            raise typer.Exit(stops.exit_code) from None
    _show(done, as_json=as_json)


def _config(
    model_name: str, recipe: str | None, assignments: list[str] | None, adapter: Path | None
) -> TrainingConfig:
    """An earlier adapter keeps its own LoRA, which no file or recipe knows of."""
    from llamahome.config import parse_assignments, resolve_training_config
    from llamahome.local import read_adapter

    layers = [("--set", parse_assignments(assignments or []))]
    if adapter is not None:
        layers.insert(0, ("--adapter", read_adapter(adapter).earlier.layer))
    return resolve_training_config(model_name=model_name, recipe=recipe, layers=layers)


def _base(base: str, settings: Settings) -> BaseRef:
    """A folder as it is named, else a registered base. Raises NotFound, InvalidData."""
    from llamahome.cli.bases import check_base
    from llamahome.local import base_of_folder
    from llamahome.schemas import BaseRef

    folder = Path(base)
    if folder.is_dir():
        check_base(folder)
        return base_of_folder(folder)
    if "/" in base or (settings.ledger_url is None and settings.state is None):
        raise _no_base(base)
    try:
        with contextlib.closing(open_ledger(settings)) as ledger:
            found = ledger.base(base)
    except NotFound as error:
        if error.code == "no_ledger":
            raise _no_base(base) from None
        raise
    check_base(Path(found.path))
    return BaseRef(name=found.name, path=found.path, digest=found.digest)


def _no_base(base: str) -> NotFound:
    return NotFound(
        f"{base!r} is neither a folder nor a registered base", field="--base",
        code="model_not_found",
        remedy="Name the folder of a model, or register it with `llamahome models add NAME DIR`",
    )  # fmt: skip


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Exit codes of a command that scripts call: 2 is for them to fix, whatever it is."""
    try:
        yield
    except TrainingFailed:
        raise
    except UserError as error:
        raise EndedWith(error, USAGE) from error
    except Unavailable as error:
        if error.code in ("disk_full", "storage_full"):
            raise EndedWith(error, USER) from error
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise EndedWith(error, USAGE) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = Unavailable(str(error), code="disk_full", remedy="Free space and --resume")
            raise EndedWith(full, USER) from error
        raise


class _Stops:
    """Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends at once."""

    def __init__(self) -> None:
        self._number: int | None = None

    def reason(self) -> StopReason | None:
        from llamahome.schemas import StopReason

        return StopReason.drain if self._number is not None else None

    @property
    def exit_code(self) -> int:
        return _TERMINATED if self._number == signal.SIGTERM else INTERRUPTED

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            raise KeyboardInterrupt
        self._number = number
        say("Stopping: a checkpoint is saved first (once more to leave at once)")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Main thread only."""
        taken = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._take) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say_stopped(stopped: LlamaHomeError, out: Path, command: list[str], *, resume: bool) -> None:
    say(f"{stopped.message[:1].upper()}{stopped.message[1:]}")
    if any((out / "checkpoints").glob("**/checkpoint-*")):
        at = command.index("train") + 1  # not at the end: what follows a "--" is a file
        again = command if resume else [*command[:at], "--resume", *command[at:]]
        say(f"Go on with: {shlex.join(['llamahome', *again])}")
    else:
        say("Nothing was saved yet: the same command starts afresh")


def _show(done: TrainedFiles, *, as_json: bool) -> None:
    training = done.report.training
    if not done.trained:
        say("It is done already")
    if as_json:
        put_json(
            {
                "adapter": str(done.adapter), "trained": done.trained, "base": done.report.base,
                "rows": done.report.preparation.training.rows, "steps": training.steps,
                "epochs": training.epochs, "trained_tokens": training.trained_tokens,
                "eval_loss_before": training.eval_loss_before,
                "eval_loss_after": training.eval_loss_after,
                "stopped_early": training.stopped_early,
                "resumed_from": training.resumed_from, "metrics": training.metrics,
            }
        )  # fmt: skip
        return
    facts(
        [
            ("adapter", str(done.adapter)),
            ("steps", str(training.steps)),
            ("eval loss", f"{number(training.eval_loss_before)} before, "
                          f"{number(training.eval_loss_after)} after"),
            *([("stopped", training.stopped_early)] if training.stopped_early else []),
        ]
    )  # fmt: skip
    if (quarantine := done.adapter.parent / "quarantine.jsonl").is_file():
        put(f"rows that could not be used: {quarantine}")
