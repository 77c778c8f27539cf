"""Text that PostgreSQL cannot keep is kept as near to it as can be, on both databases alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llamahome.errors import OperatorError
from llamahome.ledger import Claim, Ledger
from llamahome.ledger.storable import storable, storable_json
from llamahome.schemas import JobSpec, NewEvent, Stage, StageResult

ODD = "a\x00b\ud800c 😀"
KEPT = "a\ufffdb\ufffdc 😀"

Spec = Callable[..., JobSpec]
Take = Callable[..., Claim | None]


def test_only_what_cannot_be_kept_is_replaced() -> None:
    assert storable(ODD) == KEPT
    assert storable(KEPT) == KEPT
    assert (
        storable_json({"a": ["😀", 1.5, None, True]})
        == '{"a": ["\\ud83d\\ude00", 1.5, null, true]}'
    )
    assert storable_json({"\x00": ({"x": "\udfff"},)}) == '{"\\ufffd": [{"x": "\\ufffd"}]}'
    assert storable_json("\\u0000") == '"\\\\u0000"', "that text is six characters of ASCII"
    assert storable_json([float("nan"), {"x": float("inf")}]) == '[null, {"x": null}]'


def test_events_progress_and_errors_may_hold_any_text(
    ledger: Ledger, make_spec: Spec, claim: Take
) -> None:
    job, _ = ledger.submit(make_spec(shards=1))
    held = claim(Stage.validation)
    assert held is not None
    ledger.renew(
        held,
        progress={"done": 1, "loss": float("nan"), "last": ODD},
        events=[NewEvent(message=ODD, data={"row": {ODD: ODD}})],
    )
    told = ledger.events(job.id)[0][-1]
    assert (told.message, told.data) == (KEPT, {"row": {KEPT: KEPT}})
    assert ledger.runs(job.id)[0].progress == {"done": 1, "loss": None, "last": KEPT}
    ledger.fail(held, OperatorError(ODD), retry_seconds=0.0)
    error = ledger.runs(job.id)[0].attempts[0].error
    assert error is not None
    assert error["message"] == KEPT
    again = claim(Stage.validation)
    assert again is not None
    ledger.complete(again, StageResult(summary={"worst": ODD}))
    assert ledger.outputs(job.id)[0].summary == {"worst": KEPT}


@pytest.mark.parametrize("pair", [("\x00", "v"), ("a", "\x00"), ("\ud800", "v")])
def test_metadata_that_no_job_can_have_is_found_nowhere(
    ledger: Ledger, make_spec: Spec, pair: tuple[str, str]
) -> None:
    spec = make_spec().model_copy(update={"metadata": {"\ufffd": "v", "a": "\ufffd"}})
    ledger.submit(spec)
    assert ledger.jobs("acme", metadata=dict([pair])) == ([], False)
    assert len(ledger.jobs("acme", metadata={"\ufffd": "v"})[0]) == 1
