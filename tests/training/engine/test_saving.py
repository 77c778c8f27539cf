"""A job that ends while it saves: its folder is removed once it has its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Disk:
    """Writes when it is let; ``written`` are the folders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from llamahome.training.engine import saving

        self.begun, self.let = threading.Event(), threading.Event()
        self.written: list[Path] = []
        monkeypatch.setattr(saving, "save_checkpoint", self.save)

    def save(self, root: Path, snapshot: Any) -> Path:
        self.begun.set()
        self.let.wait(20)
        self.written.append(root)
        return root


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_save_that_has_begun_is_waited_for(
    make_ports: Callable[..., Any], executor: ThreadPoolExecutor, disk: Disk
) -> None:
    from llamahome.training.engine.saving import Saver

    ports, woken = make_ports("a"), threading.Event()
    saver = Saver(ports, executor, woken.set)
    saver.save(object(), 1)  # type: ignore[arg-type]
    disk.begun.wait(20)
    began = time.monotonic()
    threading.Timer(0.3, disk.let.set).start()

    saver.abandon()

    assert time.monotonic() - began > 0.25
    assert disk.written == [ports.scratch / "checkpoints"]
    assert ports.points == [], "nobody is told of it any more"
    assert woken.wait(20)


def test_a_save_that_waits_for_another_jobs_is_given_up_at_once(
    make_ports: Callable[..., Any], executor: ThreadPoolExecutor, disk: Disk
) -> None:
    from llamahome.training.engine.saving import Saver

    one, other = make_ports("one"), make_ports("other")
    savers = [Saver(ports, executor, lambda: None) for ports in (one, other)]
    for saver in savers:
        saver.save(object(), 1)  # type: ignore[arg-type]
    disk.begun.wait(20)

    savers[1].abandon()
    disk.let.set()
    savers[0].abandon()
    executor.shutdown()

    assert disk.written == [one.scratch / "checkpoints"]


def test_without_a_save_there_is_nothing_to_wait_for(
    make_ports: Callable[..., Any], executor: ThreadPoolExecutor
) -> None:
    from llamahome.training.engine.saving import Saver

    saver = Saver(make_ports("a"), executor, lambda: None)
    saver.abandon()

    assert saver.settled()
