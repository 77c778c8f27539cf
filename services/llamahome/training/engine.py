"""``python -m llamahome.training.engine``: the process that holds the base and runs the model.

It is started by a supervisor (process.py), talks to it over one socket (wire.py), keeps the base
warm between jobs, holds no secret, and dies with its supervisor.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from llamahome.errors import LlamaHomeError, OperatorError, Stopped, Unavailable
from llamahome.schemas import StopReason
from llamahome.training.ports import LocalCheckpoint
from llamahome.training.wire import (
    Admit,
    Channel,
    Done,
    Failed,
    Halted,
    Message,
    Progress,
    Quit,
    Ready,
    Said,
    Saved,
    Stop,
    Stored,
)

if TYPE_CHECKING:
    from llamahome.training.model import LoadedBase

_PR_SET_PDEATHSIG = 1  # prctl(2)
_BEAT_SECONDS = 0.1


def main() -> int:
    """Serve jobs until told to quit or the supervisor is gone. Exit status 0, or 1 when fatal."""
    parser = argparse.ArgumentParser(prog="llamahome.training.engine")
    parser.add_argument("--channel", type=int, required=True, help="inherited socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor")
    arguments = parser.parse_args()
    _die_with(arguments.parent)
    # Ctrl-C goes to the terminal's whole group; what it means here, the supervisor decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(arguments.channel, False)
    channel = Channel(socket.socket(fileno=arguments.channel))
    try:
        return _Engine(channel).serve()
    except (EOFError, BrokenPipeError):
        return 0  # the supervisor is gone; nobody is left to tell


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(0)  # it died before the call above took hold


class _Engine:
    """The warm base, and the loop over jobs."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._base: LoadedBase | None = None

    def serve(self) -> int:
        # The log's tail stands in error texts; what libraries plan to rename does not belong there.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # Imported before Ready, so that the first job finds a warm process.
        import llamahome.training.loop  # noqa: F401

        self._channel.send(Ready(pid=os.getpid()))
        while True:
            message = self._channel.receive(None)
            if isinstance(message, Quit):
                return 0
            if not isinstance(message, Admit):
                continue  # a stop that crossed with the end of its job
            answer = self._answer(message)
            self._channel.send(answer)
            if isinstance(answer, Failed) and answer.fatal:
                return 1

    def _answer(self, admit: Admit) -> Message:
        """Run a job; whatever happens becomes one message."""
        try:
            return self._train(admit)
        except Stopped as stop:
            return Halted(reason=StopReason(stop.code), message=stop.message)
        except LlamaHomeError as error:
            # After an out-of-memory error only a new process surely has all memory back.
            return Failed(error=error.to_dict(), fatal=error.code == "out_of_memory")
        except (EOFError, BrokenPipeError):
            raise
        except OSError as error:
            traceback.print_exc()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            lost = Unavailable(
                f"{type(error).__name__}: {error}", code="disk_full" if full else None,
                remedy="Free space in the scratch folder" if full else None,
            )  # fmt: skip
            return Failed(error=lost.to_dict(), fatal=False)
        except Exception as error:
            traceback.print_exc()
            ours = OperatorError(f"{type(error).__name__}: {error}")
            return Failed(error=ours.to_dict(), fatal=True)

    def _train(self, admit: Admit) -> Done:
        from llamahome.config import parse_training_config
        from llamahome.training.data import TokenData
        from llamahome.training.loop import train
        from llamahome.training.model import load_base
        from llamahome.training.runtime import Runtime, choose_machine, configured

        runtime = Runtime(admit.device, admit.threads)
        machine = choose_machine(runtime, parse_training_config(admit.spec.config, source="job"))
        if self._base is None or not self._base.serves(admit.spec.base, machine):
            self._base = None  # let go of it first: two may not fit
            with configured(machine):
                self._base = load_base(admit.spec.base, machine)
        trained = train(
            admit.spec,
            TokenData.open(Path(admit.data)),
            _WirePorts(self._channel, Path(admit.scratch)),
            runtime=runtime,
            base=self._base,
            resume=Path(admit.resume) if admit.resume is not None else None,
        )
        if not trained.report.base_unchanged:
            self._base = None
            raise OperatorError("the base's weights changed while an adapter was trained on them")
        return Done(folder=str(trained.folder), report=trained.report)


class _WirePorts:
    """The training's ports, spoken over the channel."""

    def __init__(self, channel: Channel, scratch: Path) -> None:
        self._channel = channel
        self._stop: StopReason | None = None
        self._sent = (-1, 0.0)  # steps done, monotonic seconds
        self.scratch = scratch

    def progress(self, done: int, total: int | None, data: Mapping[str, Any] | None = None) -> None:
        step, at = self._sent
        if done == step and time.monotonic() - at < _BEAT_SECONDS:
            return
        self._sent = (done, time.monotonic())
        self._channel.send(Progress(done=done, total=total, data=dict(data or {})))

    def event(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        known = cast(Literal["info", "warn", "error"], level)
        self._channel.send(Said(message=message, level=known, data=dict(data or {})))

    def checkpoint(self, point: LocalCheckpoint) -> None:
        self._channel.send(
            Saved(
                folder=str(point.folder),
                step=point.step,
                eval_loss=point.eval_loss,
                best=point.best,
            )
        )
        # Training on past a checkpoint that is not durable would gain little (an adapter's state
        # is small) and let the folder be pruned while it is read.
        while True:
            message = self._channel.receive(None)
            if isinstance(message, Stored) and message.step == point.step:
                return
            self._hear(message)

    def should_stop(self) -> StopReason | None:
        while (message := self._channel.receive(0.0)) is not None:
            self._hear(message)
        return self._stop

    def _hear(self, message: Message | None) -> None:
        if isinstance(message, Stop):
            self._stop = message.reason
        elif isinstance(message, Quit):
            raise EOFError("told to quit")


if __name__ == "__main__":
    sys.exit(main())
