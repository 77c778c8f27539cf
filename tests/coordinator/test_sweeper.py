"""The sweeper goes on, whatever becomes of one of its rounds."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from llamahome.config import load_settings
from llamahome.coordinator import Sweeper
from llamahome.errors import Unavailable
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import FaultyBell


@pytest.mark.parametrize("error", [Unavailable("away"), ZeroDivisionError("oops")])
def test_a_round_that_fails_is_followed_by_more(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(state=tmp_path, sweep_seconds=0.01)
    ledger = Ledger(settings.ledger)
    ledger.upgrade()
    stop, rounds = threading.Event(), iter(range(100))

    def sweep(*, rering_seconds: float) -> list[object]:
        if next(rounds) < 2:
            raise error
        stop.set()
        return []

    monkeypatch.setattr(ledger, "sweep", sweep)
    bell = FaultyBell(lambda stage, recover: None)
    Sweeper(ledger, bell, settings).run(stop)
    assert next(rounds) == 3
    ledger.close()
