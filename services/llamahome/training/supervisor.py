"""One job's conversation with the engine, and the engine kept warm between jobs. No torch here."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llamahome.config import Settings
from llamahome.errors import (
    Fenced,
    LlamaHomeError,
    OperatorError,
    Stopped,
    WorkerLost,
    error_from_dict,
)
from llamahome.schemas import CheckpointRef, Ports, StopReason
from llamahome.training.process import ENGINE_COMMAND, START_SECONDS, EngineProcess
from llamahome.training.wire import (
    Admit,
    Done,
    Failed,
    Halted,
    Message,
    Progress,
    Said,
    Saved,
    Stop,
    Stored,
)

POLL_SECONDS = 0.2


class EngineSlot:
    """At most one warm engine a process; a job that finds it busy gets one of its own."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._command = command
        self._busy = threading.Lock()
        self._engine: EngineProcess | None = None

    @contextlib.contextmanager
    def lease(self, settings: Settings) -> Iterator[EngineProcess]:
        """A live engine, perhaps still starting; kept afterwards unless it was killed."""
        if self._busy.acquire(blocking=False):
            try:
                yield self._usable(settings)
            finally:
                self._busy.release()
            return
        engine = self._start(settings)
        try:
            yield engine
        finally:
            engine.close()

    def _usable(self, settings: Settings) -> EngineProcess:
        engine = self._engine
        if engine is not None and (engine.owner != os.getpid() or not engine.alive()):
            self.shutdown()
            engine = None
        if engine is None:
            engine = self._engine = self._start(settings)
        engine.forget_log()
        return engine

    def _start(self, settings: Settings) -> EngineProcess:
        return EngineProcess(settings.scratch_root, settings.threads, self._command)

    def shutdown(self) -> None:
        """End the warm engine, if there is one. Harmless to repeat."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if engine.owner == os.getpid():
            engine.close()
        else:
            engine.disown()


class Session:
    """One job on the engine: what it sends goes to the ports, and stops go the other way.

    When :meth:`run` raises anything but what the engine itself reported, the engine's state is
    unknown, and it is killed.
    """

    def __init__(self, engine: EngineProcess, ports: Ports, settings: Settings) -> None:
        self._engine, self._ports, self._settings = engine, ports, settings
        self._idle = True
        self._unstored: Saved | None = None
        self._stopping: StopReason | None = None
        self._deadline = float("inf")

    def run(self, admit: Admit) -> Done:
        """Raises what the job raised, Stopped, WorkerLost (engine gone or stalled), Fenced."""
        self._await_ready()
        try:
            self._idle = False
            self._engine.send(admit)
            return self._converse()
        except (SystemExit, KeyboardInterrupt) as leaving:
            # The worker is being shut down: save what there is, then let it go on.
            try:
                self._drain()
            except (LlamaHomeError, OSError) as error:
                # Leaving matters more; the last stored checkpoint stands.
                leaving.add_note(f"not saved on the way out: {error}")
            raise
        finally:
            if not self._idle:
                self._engine.kill()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._engine.ready():
            reason = self._ports.should_stop()
            if reason is StopReason.fenced:
                raise Fenced("another attempt holds the run")
            if reason is not None:
                raise Stopped("stopped before the engine was ready", code=reason.value)
            if time.monotonic() > deadline:
                self._engine.kill()
                raise WorkerLost(
                    f"the engine was not ready in {START_SECONDS:g} s{self._engine.tail()}"
                )

    def _converse(self) -> Done:
        heard = time.monotonic()
        while True:
            message = self._engine.receive(POLL_SECONDS)
            if message is not None:
                if (done := self._take(message)) is not None:
                    return done
                heard = time.monotonic()
            elif (silent := time.monotonic() - heard) > self._settings.stall_seconds:
                raise WorkerLost(
                    f"no word from the engine for {silent:.1f} s (stall_seconds is "
                    f"{self._settings.stall_seconds:g}){self._engine.tail()}"
                )
            self._relay_stop()
            if time.monotonic() > self._deadline:
                assert self._stopping is not None
                raise Stopped("the engine did not stop in time", code=self._stopping.value)

    def _take(self, message: Message) -> Done | None:
        """Hand one message on. Returns the job's result when it is that."""
        match message:
            case Progress():
                self._ports.progress(message.done, message.total, message.data)
            case Said():
                self._ports.event(message.message, level=message.level, data=message.data)
            case Saved():
                self._store(message)
            case Done():
                self._idle = True
                if self._stopping is StopReason.cancel:
                    raise Stopped("cancelled at the last step", code=StopReason.cancel.value)
                return message
            case Halted():
                self._idle = True
                raise Stopped(message.message, code=message.reason.value)
            case Failed():
                self._idle = not message.fatal  # a fatal one leaves an engine to be killed
                raise error_from_dict(message.error)
            case _:
                raise OperatorError(f"the engine sent {message.kind!r} in the middle of a job")
        return None

    def _store(self, saved: Saved) -> None:
        """Publish a checkpoint, then point the run at it, then let the engine go on."""
        self._unstored = saved
        artifact = self._ports.publish(Path(saved.folder), "checkpoint")
        self._ports.checkpoint(
            CheckpointRef(
                step=saved.step, artifact=artifact, eval_loss=saved.eval_loss, best=saved.best
            )
        )
        self._unstored = None
        self._engine.send(Stored(step=saved.step))

    def _relay_stop(self) -> None:
        reason = self._ports.should_stop()
        if reason is None or reason is self._stopping:
            return
        if reason is StopReason.fenced:
            # Another attempt runs this job now: nothing of ours may go on, not even to save.
            raise Fenced("another attempt holds the run")
        self._ask_to_stop(reason)

    def _ask_to_stop(self, reason: StopReason) -> None:
        self._stopping = reason
        self._deadline = time.monotonic() + self._settings.drain_seconds
        self._engine.send(Stop(reason=reason))

    def _drain(self) -> None:
        """Have the engine save at its next step and stop, within ``drain_seconds``."""
        if self._idle:
            return
        self._ask_to_stop(StopReason.drain)
        if self._unstored is not None:
            self._store(self._unstored)  # interrupted half-way; publishing twice is harmless
        while time.monotonic() < self._deadline:
            message = self._engine.receive(POLL_SECONDS)
            try:
                if message is not None and self._take(message) is not None:
                    return
            except Stopped:
                return
        raise WorkerLost(f"the engine had not saved in {self._settings.drain_seconds:g} s")
