"""The lease's thread: nothing that goes wrong in it ends it, and nothing outlives the lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import pytest

from llamahome.errors import Unavailable
from llamahome.ledger import Claim, Ledger
from llamahome.queueing.lease import LeaseKeeper
from llamahome.schemas import JobSpec, JsonObject, NewEvent, Stage, StopReason


def _claim(ledger: Ledger, spec: JobSpec, seconds: float) -> Claim:
    ledger.submit(spec)
    claim = ledger.claim(Stage.validation, "w", host="h", pid=1, lease_seconds=seconds)
    assert claim is not None
    return claim


class Flaky:
    """A ledger whose first ``failures`` renewals fail, and all that carry ``poison``."""

    def __init__(self, ledger: Ledger, failures: list[Exception], poison: str = "") -> None:
        self._ledger, self._failures, self._poison = ledger, failures, poison
        self.renewals = 0

    def renew(
        self, claim: Claim, *, progress: JsonObject | None = None, events: Iterable[NewEvent] = ()
    ) -> StopReason | None:
        self.renewals += 1
        if self._poison and any(event.message == self._poison for event in events):
            raise ValueError("this cannot be written")
        if self._failures:
            raise self._failures.pop(0)
        return self._ledger.renew(claim, progress=progress, events=events)


def _until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        threading.Event().wait(0.01)
    return condition()


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), Unavailable("away")])
def test_a_renewal_that_fails_is_tried_again_before_the_lease_is_lost(
    ledger: Ledger, make_spec: Callable[..., JobSpec], error: Exception
) -> None:
    """Two failures in a row, each a third of the lease later, would already be too late."""
    claim = _claim(ledger, make_spec(), 6.0)
    flaky = Flaky(ledger, [error] * 2)
    with LeaseKeeper(flaky, claim) as keeper:  # type: ignore[arg-type]
        threading.Event().wait(5.2)
        assert flaky.renewals >= 3
        assert keeper.reason is None
    assert ledger.renew(claim) is None


def test_an_event_that_cannot_be_written_costs_itself_and_not_the_lease(
    ledger: Ledger, make_spec: Callable[..., JobSpec]
) -> None:
    claim = _claim(ledger, make_spec(), 3.0)
    flaky = Flaky(ledger, [], poison="bad")
    with LeaseKeeper(flaky, claim) as keeper:  # type: ignore[arg-type]
        keeper.event(NewEvent(message="bad"))
        assert _until(lambda: flaky.renewals >= 1)
        keeper.event(NewEvent(message="good"))
        assert _until(lambda: ledger.events(claim.task.job_id)[0][-1].message == "good")
        assert keeper.reason is None
    assert keeper.take_events() == []


def test_a_lease_that_can_never_be_renewed_tells_its_attempt_to_stop(
    ledger: Ledger, make_spec: Callable[..., JobSpec]
) -> None:
    claim = _claim(ledger, make_spec(), 1.0)
    flaky = Flaky(ledger, [ZeroDivisionError("oops") for _ in range(1000)])
    began = time.monotonic()
    with LeaseKeeper(flaky, claim) as keeper:  # type: ignore[arg-type]
        assert _until(lambda: keeper.reason is not None)
    assert keeper.reason is StopReason.fenced
    assert 0.75 < time.monotonic() - began < 1.5
