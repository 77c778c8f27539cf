"""``python -m llamahome.training.engine``: the process that holds the base and runs the model.

It is started by a supervisor (process.py), talks to it over one socket (wire.py), keeps the base
warm between jobs, trains many side by side, holds no secret, and dies with its supervisor.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.errors import TrainingFailed
from llamahome.schemas import StopReason
from llamahome.training.engine.wire_ports import WirePorts
from llamahome.training.ports import TrainedAdapter
from llamahome.training.wire import (
    Admit,
    Channel,
    Failed,
    Halted,
    Message,
    Quit,
    Ready,
    Stop,
    Stored,
)

if TYPE_CHECKING:
    from llamahome.config import TrainingConfig
    from llamahome.training.checkpoints import Tensors
    from llamahome.training.data import TokenData
    from llamahome.training.engine.ticks import Engine
    from llamahome.training.runtime import Machine

_PR_SET_PDEATHSIG = 1  # prctl(2)


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
        return _Server(channel).serve()
    except (EOFError, BrokenPipeError):
        return 0  # the supervisor is gone, or said so; nobody is left to tell


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(0)  # it died before the call above took hold


class _Server:
    """Hears the supervisor in one thread, and trains in this one.

    What is heard becomes a call in the inbox, which the engine makes between two ticks.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._ports: dict[str, WirePorts] = {}
        self._waiting: list[Admit] = []
        self._fatal = False

    def serve(self) -> int:
        # The log's tail stands in error texts; what libraries plan to rename does not belong there.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # Imported before Ready, so that the first job finds a warm process.
        import llamahome.training.loop  # noqa: F401

        self._channel.send(Ready(pid=os.getpid()))
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        while not self._fatal:
            self._turn()
        return 1

    def _turn(self) -> None:
        if self._busy:
            assert self._engine is not None
            self._engine.tick(wait=True)
        elif self._waiting:
            # All of them: those of the base that is loaded now go side by side.
            waiting, self._waiting = self._waiting, []
            for admit in waiting:
                self._admit(admit)
        else:
            self._inbox.get()()

    @property
    def _busy(self) -> bool:
        return self._engine is not None and self._engine.busy

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive(None)) is not None:
                self._inbox.put(lambda heard=message: self._hear(heard))  # type: ignore[misc]
                if isinstance(message, Quit):
                    return
        except (EOFError, OSError, ValueError):
            self._inbox.put(lambda: self._hear(Quit()))

    def _hear(self, message: Message) -> None:
        match message:
            case Quit():
                raise EOFError("told to quit")
            case Admit():
                self._admit(message)
            case Stop(job=job) if job in self._ports:
                self._ports[job].stop = message.reason
            case Stop(job=job):
                self._give_up_waiting(job, message.reason)
            case Stored(job=job) if job in self._ports:
                self._ports[job].stored.add(message.step)
            case _:
                pass  # it crossed with the end of its job

    def _give_up_waiting(self, job: str, reason: StopReason) -> None:
        for admit in self._waiting:
            if admit.job == job:
                self._waiting.remove(admit)
                message = "stopped before it began"
                self._channel.send(Halted(job=job, reason=reason, message=message))
                return

    def _admit(self, admit: Admit) -> None:
        """Take a job in, or keep it until those at work have ended: of another base, or too large
        to go beside it."""
        ports = self._ports[admit.job] = WirePorts(self._channel, admit.job, Path(admit.scratch))
        try:
            if not self._begin(admit, ports):
                del self._ports[admit.job]
                self._waiting.append(admit)
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # becomes the job's one answer; the traceback goes to the log
            self._end(admit, error)

    def _begin(self, admit: Admit, ports: WirePorts) -> bool:
        from llamahome.config import parse_training_config
        from llamahome.training.data import TokenData
        from llamahome.training.loop import load_snapshot, machine_for
        from llamahome.training.model import check_fits
        from llamahome.training.runtime import Runtime

        config = parse_training_config(admit.spec.config, source="job")
        runtime = Runtime(admit.device, admit.threads, admit.memory_bytes, admit.tick_tokens)
        snapshot = load_snapshot([Path(each) for each in admit.resume], ports)
        machine = machine_for(runtime, config, snapshot)
        engine = self._engine_for(admit, machine)
        if engine is None:
            return False
        data = TokenData.open(Path(admit.data))
        data.check()
        check_fits(engine.warm.loaded, data, config)
        engine.admit(
            admit.spec, config, data, ports, machine, lambda outcome: self._end(admit, outcome),
            snapshot=snapshot, start=_start_of(admit, config, data),
        )  # fmt: skip
        return True

    def _engine_for(self, admit: Admit, machine: Machine) -> Engine | None:
        """The engine with the job's base warm; None while another base is at work."""
        from llamahome.training.engine.ticks import Engine
        from llamahome.training.model import load_base
        from llamahome.training.runtime import configured

        if self._engine is not None and self._engine.serves(admit.spec.base, machine):
            return self._engine
        if self._engine is not None:
            if self._busy:
                return None
            self._engine.close()
            self._engine = None  # let go of its base first: two may not fit
        with configured(machine):
            loaded = load_base(admit.spec.base, machine)
        self._engine = Engine(loaded, machine, self._inbox)
        return self._engine

    def _end(self, admit: Admit, outcome: TrainedAdapter | Exception) -> None:
        """Whatever happened becomes one message; but a job that had not the memory to itself
        goes on from its last checkpoint when it has."""
        from llamahome.training.engine.answers import answer
        from llamahome.training.engine.memory import failure_of

        if isinstance(outcome, Exception):
            outcome = failure_of(outcome)
        ports = self._ports.pop(admit.job)
        if self._busy and ports.stop is None and _lacked_memory(outcome):
            ports.event(f"It waits until the jobs beside it have ended: {outcome}", level="warn")
            self._waiting.append(_from_its_last(admit))
            return
        message = answer(admit.job, outcome)
        self._fatal = self._fatal or (isinstance(message, Failed) and message.fatal)
        self._channel.send(message)


def _lacked_memory(outcome: TrainedAdapter | Exception) -> bool:
    return isinstance(outcome, TrainingFailed) and outcome.code == "out_of_memory"


def _from_its_last(admit: Admit) -> Admit:
    """The same job, to go on from what it has saved here."""
    saved = sorted((Path(admit.scratch) / "checkpoints").glob("checkpoint-*"), reverse=True)
    earlier = [Path(each) for each in admit.resume if Path(each).is_dir()]
    resume = tuple(str(each) for each in dict.fromkeys([*saved, *earlier]))
    return admit.model_copy(update={"resume": resume})


def _start_of(admit: Admit, config: TrainingConfig, data: TokenData) -> Tensors | None:
    """The weights to go on from, where the job goes on from any."""
    from llamahome.training.continuing import load_start

    if admit.adapter is None:
        return None
    name = admit.spec.adapter_name or "adapter"
    return load_start(Path(admit.adapter), config, name, data.added)


if __name__ == "__main__":
    sys.exit(main())
