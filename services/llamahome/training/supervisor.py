"""The engine kept warm between jobs, and each job's conversation with it. No torch here."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from llamahome.training.crashing import crash_point
from llamahome.training.process import ENGINE_COMMAND, START_SECONDS, EngineProcess, Line
from llamahome.training.wire import (
    Admit,
    Done,
    Failed,
    FromEngine,
    Halted,
    Progress,
    Said,
    Saved,
    Stop,
    Stored,
)

POLL_SECONDS = 0.2
_LEAVE_SECONDS = 5.0  # for the last job on an engine to get off it


class WarmEngine:
    """The process's one engine, shared by all jobs that it trains; started when first needed."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._engine: EngineProcess | None = None
        self._users = 0
        self._starter: tuple[int, ThreadPoolExecutor] | None = None

    @contextlib.contextmanager
    def lease(self, settings: Settings, job: str) -> Iterator[Line]:
        """A line to a live engine, perhaps still starting; the engine stays afterwards.

        Raises WorkerLost where it dies at once, and OSError where it cannot be started.
        """
        with self._lock:
            engine = self._usable(settings)
            line = engine.line(job)
            self._users += 1
        try:
            yield line
        finally:
            line.close()
            with self._lock:
                self._users -= 1

    def _usable(self, settings: Settings) -> EngineProcess:
        engine = self._engine
        if engine is not None and (engine.owner != os.getpid() or not engine.alive()):
            self._end()
            engine = None
        if engine is None:
            engine = self._engine = self._start(settings)
        elif not self._users:
            engine.forget_log()
        return engine

    def _start(self, settings: Settings) -> EngineProcess:
        """In a thread that lives as long as this process: the engine dies with it."""
        if self._starter is None or self._starter[0] != os.getpid():
            self._users = 0
            self._starter = (os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="starter"))
        return (
            self._starter[1]
            .submit(EngineProcess, settings.scratch_root, settings.threads, self._command)
            .result()
        )

    def shutdown(self) -> None:
        """End the engine, if there is one. Harmless to repeat."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if engine.owner == os.getpid():
            engine.close()
        else:
            engine.disown()


class Session:
    """One job on the engine: what it sends goes to the ports, and stops go the other way.

    Other jobs go on when this one ends, however it does: the engine is killed only where it has
    said nothing, of any job, for ``stall_seconds``, or does not let go of the last one that it has.
    """

    def __init__(self, line: Line, ports: Ports, settings: Settings) -> None:
        self._line, self._ports, self._settings = line, ports, settings
        self._on_engine = False
        self._unstored: Saved | None = None
        self._stopping: StopReason | None = None
        self._deadline = float("inf")

    def run(self, admit: Admit) -> Done:
        """Raises what the job raised, Stopped, WorkerLost (engine gone or stalled), Fenced."""
        self._await_ready()
        try:
            self._line.send(admit)
            self._on_engine = True
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
            self._leave()

    def _await_ready(self) -> None:
        engine = self._line.engine
        deadline = time.monotonic() + START_SECONDS
        while not engine.ready():
            reason = self._ports.should_stop()
            if reason is StopReason.fenced:
                raise Fenced("another attempt holds the run")
            if reason is not None:
                raise Stopped("stopped before the engine was ready", code=reason.value)
            if time.monotonic() > deadline:
                engine.kill()
                raise WorkerLost(f"the engine was not ready in {START_SECONDS:g} s{engine.tail()}")

    def _converse(self) -> Done:
        began = time.monotonic()
        while True:
            message = self._line.receive(POLL_SECONDS)
            if message is not None:
                if (done := self._take(message)) is not None:
                    return done
            else:
                self._check_stall(began)
            self._relay_stop()
            if time.monotonic() > self._deadline:
                assert self._stopping is not None
                raise Stopped("the engine did not stop in time", code=self._stopping.value)

    def _check_stall(self, began: float) -> None:
        """An engine that says nothing, of any job, hangs."""
        engine, silent = self._line.engine, self._silent(began)
        if silent <= self._settings.stall_seconds:
            return
        engine.kill()
        self._on_engine = False
        raise WorkerLost(
            f"no word from the engine for {silent:.1f} s (stall_seconds is "
            f"{self._settings.stall_seconds:g}){engine.tail()}"
        )

    def _silent(self, began: float) -> float:
        """Seconds since the engine was heard, or since ``began`` where that is later."""
        return time.monotonic() - max(began, self._line.engine.heard_at)

    def _take(self, message: FromEngine) -> Done | None:
        """Hand one message on. Returns the job's result when it is that."""
        match message:
            case Progress():
                self._ports.progress(message.done, message.total, message.data)
            case Said():
                self._ports.event(message.message, level=message.level, data=message.data)
            case Saved():
                self._store(message)
            case Done():
                self._on_engine = False
                if self._stopping is StopReason.cancel:
                    raise Stopped("cancelled at the last step", code=StopReason.cancel.value)
                return message
            case Halted():
                self._on_engine = False
                raise Stopped(message.message, code=message.reason.value)
            case Failed():
                self._on_engine = False
                if message.fatal:
                    self._line.engine.kill()  # by its own word it is of no more use, to any job
                raise error_from_dict(message.error)
            case _:
                raise OperatorError(f"the engine sent {message.kind!r} in the middle of a job")
        return None

    def _store(self, saved: Saved) -> None:
        """Publish a checkpoint, then point the run at it, then tell the engine."""
        self._unstored = saved
        artifact = self._ports.publish(Path(saved.folder), "checkpoint")
        crash_point("before_pointer")
        self._ports.checkpoint(
            CheckpointRef(
                step=saved.step, artifact=artifact, eval_loss=saved.eval_loss, best=saved.best
            )
        )
        crash_point("after_pointer")
        self._unstored = None
        self._line.send(Stored(job=saved.job, step=saved.step))

    def _relay_stop(self) -> None:
        reason = self._ports.should_stop()
        if reason is None or reason is self._stopping:
            return
        if reason is StopReason.fenced:
            # Another attempt runs this job now: nothing of ours may be published.
            raise Fenced("another attempt holds the run")
        self._ask_to_stop(reason)

    def _ask_to_stop(self, reason: StopReason) -> None:
        self._stopping = reason
        self._deadline = time.monotonic() + self._settings.drain_seconds
        self._line.send(Stop(job=self._line.job, reason=reason))

    def _drain(self) -> None:
        """Have the engine save at its next step and stop, within ``drain_seconds``."""
        if not self._on_engine:
            return
        self._ask_to_stop(StopReason.drain)
        if self._unstored is not None:
            self._store(self._unstored)  # interrupted half-way; publishing twice is harmless
        while time.monotonic() < self._deadline:
            message = self._line.receive(POLL_SECONDS)
            try:
                if message is not None and self._take(message) is not None:
                    return
            except Stopped:
                return
        raise WorkerLost(f"the engine had not saved in {self._settings.drain_seconds:g} s")

    def _leave(self) -> None:
        """Get the job off the engine where it still is, so that its folder can be removed.

        A stop is heard between two ticks. Beside others that is waited for however long a tick or
        the loading of a base takes; an engine that nobody else wants is killed soon.
        """
        engine = self._line.engine
        if not self._on_engine or not engine.alive():
            return
        self._line.leave()
        began = time.monotonic()
        try:
            self._line.send(Stop(job=self._line.job, reason=StopReason.cancel))
            while self._silent(began) <= self._settings.stall_seconds:
                if isinstance(self._line.receive(POLL_SECONDS), Done | Halted | Failed):
                    return
                if time.monotonic() - began > _LEAVE_SECONDS and not engine.wanted():
                    break
        except WorkerLost:
            return  # it is off, and so is every other: they find out for themselves
        engine.kill()
