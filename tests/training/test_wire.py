from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from llamahome.schemas import StopReason
from llamahome.training import wire
from llamahome.training.process import engine_environment


@pytest.fixture
def ends() -> Iterator[tuple[wire.Channel, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield wire.Channel(left), right


def test_the_messages_are_frozen() -> None:
    """A supervisor and an engine of two versions may meet: a change here needs a new ``v``."""
    fields = {
        kind.__name__: sorted(kind.model_fields)
        for kind in (
            wire.Admit, wire.Stop, wire.Stored, wire.Quit, wire.Ready, wire.Progress, wire.Said,
            wire.Saved, wire.Done, wire.Failed, wire.Halted,
        )
    }  # fmt: skip

    assert fields == {
        "Admit": [
            "adapter",
            "data",
            "device",
            "job",
            "kind",
            "memory_bytes",
            "resume",
            "scratch",
            "spec",
            "threads",
            "tick_tokens",
            "v",
        ],
        "Stop": ["job", "kind", "reason"],
        "Stored": ["job", "kind", "step"],
        "Quit": ["kind"],
        "Ready": ["kind", "pid", "v"],
        "Progress": ["data", "done", "job", "kind", "total"],
        "Said": ["data", "job", "kind", "level", "message"],
        "Saved": ["best", "eval_loss", "folder", "job", "kind", "step"],
        "Done": ["folder", "job", "kind", "report"],
        "Failed": ["error", "fatal", "job", "kind"],
        "Halted": ["job", "kind", "message", "reason"],
    }


def test_messages_arrive_whole_however_they_are_cut(
    ends: tuple[wire.Channel, socket.socket],
) -> None:
    channel, other = ends
    first = wire.Said(job="j", message="Wörter\n", level="info", data={"loss": 1.5})
    second = wire.Stop(job="j", reason=StopReason.drain)
    text = first.model_dump_json().encode() + b"\n" + second.model_dump_json().encode() + b"\n"
    other.sendall(text[:20])

    assert channel.receive(0.01) is None
    other.sendall(text[20:])
    assert channel.receive(1) == first
    assert channel.receive(0) == second
    assert channel.receive(0) is None


def test_the_end_of_the_other_side_is_an_end_and_not_a_message(
    ends: tuple[wire.Channel, socket.socket],
) -> None:
    channel, other = ends
    other.close()

    with pytest.raises(EOFError):
        channel.receive(1)


@pytest.mark.parametrize("line", [b"oops\n", b'{"kind": "other"}\n', b'{"kind": "quit", "x": 1}\n'])
def test_what_is_no_message_is_refused(
    ends: tuple[wire.Channel, socket.socket], line: bytes
) -> None:
    channel, other = ends
    other.sendall(line)

    with pytest.raises(ValueError, match="validation error"):
        channel.receive(1)


def test_no_secret_is_handed_to_the_engine() -> None:
    given = {
        "PATH": "/bin", "HOME": "/home/x", "CUDA_VISIBLE_DEVICES": "1", "LLAMAHOME_CRASH_AT": "x",
        "LLAMAHOME_LEDGER_URL": "s", "LLAMAHOME_REDIS_URL": "s", "LLAMAHOME_KEY": "s",
        "LLAMAHOME_STATE": "s", "AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "s", "PGPASSWORD": "s",
        "DATABASE_URL": "s", "OPENAI_API_KEY": "s",
    }  # fmt: skip

    environment = engine_environment(given, threads=3)

    assert "s" not in environment.values()
    assert {"PATH", "HOME", "CUDA_VISIBLE_DEVICES", "LLAMAHOME_CRASH_AT"} <= set(environment)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
