from __future__ import annotations

import pytest

from llamahome.cli.progress import (
    Eta,
    event_line,
    headline,
    percent,
    stage_rows,
    stage_state,
    training_line,
)
from llamahome.schemas import JobError, RunState, Stage, Step

from .things import attempt, event, job, run, training


def test_stages_show_shards_done_workers_waits_and_time() -> None:
    runs = [
        run(shard=0, attempts=(attempt(pid=1, queue_wait_seconds=0.1),)),
        run(shard=1, attempts=(attempt(pid=2, queue_wait_seconds=4.0),)),
        run(shard=2, state=RunState.running, attempts=(attempt(pid=1, run_seconds=None),)),
        run(step=Step.close, state=RunState.blocked),
        run(Stage.preprocessing, Step.close, state=RunState.blocked),
        run(Stage.training, Step.train, state=RunState.blocked),
    ]
    assert stage_rows(job("validating"), runs) == [
        ["validation", "running", "2/3 shards", "2", "4 s", "3 s"],
        ["preprocessing", "waiting", "-", "-", "-", "-"],
        ["training", "waiting", "-", "-", "-", "-"],
    ]


def test_the_training_stage_counts_optimizer_steps() -> None:
    rows = stage_rows(training(12), [run(Stage.training, Step.train, state=RunState.running)])
    assert rows[2][:3] == ["training", "running", "step 12/120"]


@pytest.mark.parametrize(
    ("states", "word"),
    [
        ([], "waiting"),
        (["blocked"], "waiting"),
        (["ready", "blocked"], "ready"),
        (["done", "ready"], "running"),
        (["done", "running"], "running"),
        (["done", "done"], "done"),
        (["done", "failed", "running"], "failed"),
        (["parked", "cancelled"], "parked"),
        (["done", "cancelled"], "cancelled"),
    ],
)
def test_the_worst_run_names_its_stage(states: list[str], word: str) -> None:
    assert stage_state([run(state=RunState(state)) for state in states]) == word


def test_the_training_line_has_every_number_a_watcher_asks_for() -> None:
    now = training(
        12, loss=2.34567, eval_loss=2.5, learning_rate=5e-5, grad_norm=1.2345,
        tokens_per_second=1234.5,
    )  # fmt: skip
    assert training_line(now, 95.0) == (
        "step 12/120 (10 %)  loss 2.346  eval loss 2.5  lr 5e-05  grad norm 1.23  1234 tok/s  "
        "ETA 1 m 35 s"
    )


def test_numbers_that_are_not_there_yet_are_dashes() -> None:
    assert training_line(training(0)) == (
        "step 0/120 (0 %)  loss -  eval loss -  lr -  grad norm -  - tok/s  ETA -"
    )


def test_before_the_number_of_steps_is_known_the_job_just_starts() -> None:
    assert training_line(training(0, None)) is None
    assert headline(training(0, None)) == "starts"


def test_the_eta_is_the_pace_since_the_first_look() -> None:
    eta = Eta()
    assert eta.left(training(10), now=100.0) is None
    assert eta.left(training(20), now=105.0) == pytest.approx(50.0)
    assert eta.left(training(70), now=130.0) == pytest.approx(25.0)


def test_between_two_steps_the_eta_counts_down_to_nothing() -> None:
    eta = Eta()
    eta.left(training(10), now=0.0)
    lefts = [eta.left(training(110), now=now) for now in (10.0, 10.5, 11.0, 20.0)]
    assert lefts == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_what_comes_before_the_first_step_is_not_taken_for_a_pace() -> None:
    eta = Eta()
    assert eta.left(training(0), now=0.0) is None
    assert eta.left(training(1), now=100.0) is None
    assert eta.left(training(2), now=101.0) == pytest.approx(118.0)


def test_the_eta_starts_anew_when_the_job_went_back_to_a_checkpoint() -> None:
    eta = Eta()
    eta.left(training(50), now=0.0)
    assert eta.left(training(30), now=100.0) is None
    assert eta.left(training(40), now=110.0) == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("state", "fields", "line"),
    [
        ("accepted", {}, ""),
        ("validating", {}, "validation 1/2 shards"),
        ("queued", {"queue_position": 3}, "waits for a training worker, place 3 in the queue"),
        ("queued", {}, "waits for a training worker"),
        ("running", {}, "starts"),
        ("succeeded", {"fine_tuned_model": "ft:tiny", "finished_at": 1_700_000_075},
         "ft:tiny in 1 m 15 s"),
        ("failed", {"error": JobError(code="bad", message="row 3")}, "bad: row 3"),
        ("cancelled", {}, ""),
    ],
)  # fmt: skip
def test_each_state_has_its_line(state: str, fields: dict[str, object], line: str) -> None:
    runs = [run(shard=0), run(shard=1, state=RunState.ready)]
    assert headline(job(state, **fields), runs) == line


def test_percent_is_of_the_stage_and_whole_at_the_end() -> None:
    assert [percent(j) for j in (training(30), job("queued"), job("succeeded"))] == [
        "25 %", "-", "100 %",
    ]  # fmt: skip


def test_warnings_among_events_say_so() -> None:
    assert event_line(event("slow", level="warn")).endswith("  warn: slow")
    assert event_line(event("begun")).endswith("  begun")
