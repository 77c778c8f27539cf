"""The messages between the supervisor and its engine: frozen JSON lines over one local socket.

To the engine: :class:`Admit`, :class:`Stop`, :class:`Stored`, :class:`Quit`. From it:
:class:`Ready` once, then for each admitted job any number of :class:`Progress`, :class:`Said` and
:class:`Saved` (each answered with Stored), and exactly one of :class:`Done`, :class:`Failed` and
:class:`Halted`. Many jobs are talked of over one socket; ``job`` names an attempt at one.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from llamahome.schemas import JobSpec, JsonObject, Schema, StopReason, TrainingReport

_MAX_LINE_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 65_536


class Admit(Schema):
    """Train this. Paths are absolute and local."""

    kind: Literal["admit"] = "admit"
    v: Literal[1] = 1
    job: str
    spec: JobSpec
    data: str
    scratch: str
    resume: tuple[str, ...] = Field(default=(), description="checkpoints, the one to try first")
    adapter: str | None = Field(default=None, description="the earlier adapter to go on from")
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    memory_bytes: int | None = None
    tick_tokens: int = 0


class Stop(Schema):
    """End at the next step boundary; on pause and drain, save first."""

    kind: Literal["stop"] = "stop"
    job: str
    reason: StopReason


class Stored(Schema):
    """The checkpoint of ``step`` is durable."""

    kind: Literal["stored"] = "stored"
    job: str
    step: int


class Quit(Schema):
    kind: Literal["quit"] = "quit"


class Ready(Schema):
    """The engine is up and waits for jobs."""

    kind: Literal["ready"] = "ready"
    v: Literal[1] = 1
    pid: int


class Progress(Schema):
    kind: Literal["progress"] = "progress"
    job: str
    done: int
    total: int | None
    data: JsonObject


class Said(Schema):
    """An event of the job."""

    kind: Literal["said"] = "said"
    job: str
    message: str
    level: Literal["info", "warn", "error"]
    data: JsonObject


class Saved(Schema):
    """A checkpoint lies in ``folder``, and stays there until it is stored."""

    kind: Literal["saved"] = "saved"
    job: str
    folder: str
    step: int
    eval_loss: float | None
    best: bool


class Done(Schema):
    kind: Literal["done"] = "done"
    job: str
    folder: str
    report: TrainingReport


class Failed(Schema):
    """``error`` is :meth:`LlamaHomeError.to_dict`; after a ``fatal`` one the engine ends."""

    kind: Literal["failed"] = "failed"
    job: str
    error: JsonObject
    fatal: bool


class Halted(Schema):
    """The job ended because it was asked to."""

    kind: Literal["halted"] = "halted"
    job: str
    reason: StopReason
    message: str


ToEngine = Admit | Stop | Stored | Quit
FromEngine = Ready | Progress | Said | Saved | Done | Failed | Halted
Message = ToEngine | FromEngine

_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


class Channel:
    """One end of the socket. Any thread may send; one at a time may receive."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def send(self, message: Message) -> None:
        """Raises OSError (BrokenPipeError) where the other end is gone."""
        line = message.model_dump_json().encode() + b"\n"
        with self._sending:
            self._sock.sendall(line)

    def receive(self, timeout_seconds: float | None) -> Message | None:
        """The next message, or None when none has come in time; None waits for ever.

        Raises EOFError where the other end is gone, ValueError where it does not speak this.
        """
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = bytearray(rest)
                return _MESSAGES.validate_json(bytes(line))
            if len(self._buffer) > _MAX_LINE_BYTES:
                raise ValueError(f"a message of more than {_MAX_LINE_BYTES} bytes")
            if not select.select([self._sock], [], [], timeout_seconds)[0]:
                return None
            try:
                chunk = self._sock.recv(_CHUNK_BYTES)
            except ConnectionError as error:
                raise EOFError(str(error)) from error
            if not chunk:
                raise EOFError("the other end has closed the channel")
            self._buffer += chunk

    def close(self) -> None:
        self._sock.close()
