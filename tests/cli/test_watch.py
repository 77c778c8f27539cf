from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamahome.cli.watch import (
    GIVE_UP_SECONDS,
    LiveDisplay,
    PlainDisplay,
    Update,
    follow,
)
from llamahome.client import Client
from llamahome.client.fake import FakeServer
from llamahome.errors import Unavailable
from llamahome.schemas import JobState, RunState, Stage, Step

from .conftest import Gateway
from .things import event, job, run, training


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _plain() -> tuple[PlainDisplay, io.StringIO, list[float]]:
    stream, now = io.StringIO(), [100.0]
    return PlainDisplay(stream, clock=lambda: now[0]), stream, now


def _lines(stream: io.StringIO) -> list[str]:
    return [line[10:] for line in stream.getvalue().splitlines()]  # without the time


def test_off_a_terminal_each_new_state_is_a_line() -> None:
    display, stream, _ = _plain()
    for state in ("accepted", "validating", "validating", "queued"):
        display.show(Update(job(state), [], []))
    assert _lines(stream) == [
        "ftjob-1 accepted",
        "ftjob-1 validating: validation",
        "ftjob-1 queued: waits for a training worker",
    ]
    assert "\x1b" not in stream.getvalue()


def test_off_a_terminal_changing_numbers_are_a_line_in_ten_seconds_at_most() -> None:
    display, stream, now = _plain()
    for second in range(25):
        now[0] = 100.0 + second
        display.show(Update(training(second, 120), [], []))
    steps = [re.search(r"step (\d+)/", line) for line in _lines(stream)]
    assert [found[1] for found in steps if found] == ["0", "10", "20"]


def test_off_a_terminal_numbers_that_stand_still_are_not_repeated() -> None:
    display, stream, now = _plain()
    for second in range(30):
        now[0] = 100.0 + second
        display.show(Update(job("queued"), [], []))
    assert len(_lines(stream)) == 1


def test_events_are_told_as_they_come_but_not_the_metrics_of_each_step() -> None:
    display, stream, _ = _plain()
    news = [
        event("Files validated"),
        event("Step 1/9", type="metrics", data={"step": 1, "train_loss": 6.0}),
        event("Evaluation after epoch 1", type="metrics", data={"step": 1, "eval_loss": 5.0}),
    ]
    display.show(Update(job("queued"), [], news))
    assert _lines(stream)[:2] == ["Files validated", "Evaluation after epoch 1"]
    assert "Step 1/9" not in stream.getvalue()


def test_an_event_cannot_move_the_cursor_or_break_the_line() -> None:
    display, stream, _ = _plain()
    display.show(Update(job("queued"), [], [event("a\nb\x1b[2J")]))
    assert _lines(stream)[0] == "a b?[2J"


def test_on_a_terminal_stages_numbers_and_events_are_drawn() -> None:
    stream = Terminal()
    runs = [run(shard=0), run(shard=1, state=RunState.running), run(Stage.training, Step.train)]
    with LiveDisplay(stream) as display:
        display.show(Update(training(12, loss=2.5), runs, [event("Files validated")]))
        display.note("the gateway is away")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for part in ("validation", "1/2 shards", "step 12/120 (10 %)", "loss 2.5", "Files validated"):
        assert part in text
    assert "the gateway is away" in text


def _following(server: FakeServer, pause: list[str]) -> tuple[str, list[Update], list[str]]:
    """Follow a job of ``server``; before each new look it is moved to the next state given."""
    seen: list[Update] = []
    notes: list[str] = []

    class Recorder(PlainDisplay):
        def show(self, update: Update) -> None:
            seen.append(update)

        def note(self, text: str) -> None:
            notes.append(text)

    with server.client(retries=0) as client:
        file = server.add_file("rows.jsonl", "fine-tune", b"{}")
        assert isinstance(file, dict)
        job_id = client.submit(file["id"], base="tiny").id
        states = iter(pause)
        ended = follow(
            client, job_id, Recorder(io.StringIO()),
            pause=lambda _: _move(server, job_id, next(states)),
        )  # fmt: skip
    return ended.state.value, seen, notes


def _move(server: FakeServer, job_id: str, word: str) -> None:
    if word == "down":
        server.break_down(times=1)
    else:
        server.advance(job_id, word)


def test_a_job_is_followed_to_its_end_and_no_event_is_told_twice() -> None:
    state, seen, _ = _following(FakeServer(), ["validating", "running", "succeeded"])
    assert state == "succeeded"
    assert [update.job.state for update in seen] == [
        JobState.accepted, JobState.validating, JobState.running, JobState.succeeded,
    ]  # fmt: skip
    told = [event.message for update in seen for event in update.events]
    assert len(told) == len(set(told)) == 4


def test_a_gateway_that_is_away_for_a_moment_is_waited_for() -> None:
    state, seen, notes = _following(FakeServer(), ["running", "down", "down", "succeeded"])
    assert state == "succeeded"
    assert len(notes) == 2
    assert "does not answer" in notes[0]
    assert "the job is not affected" in notes[0]


def test_a_gateway_that_stays_away_ends_the_watching() -> None:
    server, now = FakeServer(), [0.0]
    file = server.add_file("rows.jsonl", "fine-tune", b"{}")
    assert isinstance(file, dict)
    with server.client(retries=0) as client:
        job_id = client.submit(file["id"], base="tiny").id
        server.break_down(times=100)

        def pause(_: float) -> None:
            now[0] += 20

        with pytest.raises(Unavailable):
            follow(client, job_id, _plain()[0], pause=pause, clock=lambda: now[0])
    assert now[0] > GIVE_UP_SECONDS


def test_a_long_list_of_runs_is_asked_for_less_often(gateway: Gateway) -> None:
    file = gateway.fake.add_file("rows.jsonl", "fine-tune", b"{}")
    assert isinstance(file, dict)
    asked, now = list[str](), [0.0]
    gateway.before_answer = asked.append
    with gateway.fake.client() as client:
        job_id = client.submit(file["id"], base="tiny").id
    path = f"/v1/fine_tuning/jobs/{job_id}/runs"
    gateway.lists[path] = [run(shard=i).model_dump(mode="json") for i in range(1000)]

    def pause(_: float) -> None:
        now[0] += 1
        if now[0] == 20:
            gateway.fake.advance(job_id, "cancelled")

    with Client(gateway.url, gateway.fake.key) as client:
        follow(client, job_id, _plain()[0], pause=pause, clock=lambda: now[0])
    assert asked.count(path) == 3, "at first, after 10 s, and when the state had changed"
    assert asked.count(path.removesuffix("/runs")) == 21


@pytest.mark.fleet
def test_ctrl_c_ends_the_watching_and_leaves_the_job(gateway: Gateway, rows: Path) -> None:
    with gateway.fake.client() as client:
        with rows.open("rb") as file:
            uploaded = gateway.fake.add_file("rows.jsonl", "fine-tune", file.read())
        assert isinstance(uploaded, dict)
        job_id = client.submit(uploaded["id"], base="tiny").id
        looked = threading.Event()
        gateway.before_answer = lambda path: looked.set() if path.endswith("/events") else None
        watching = subprocess.Popen(
            [sys.executable, "-m", "llamahome.cli", "watch", job_id],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert watching.stdout is not None
        assert "accepted" in watching.stdout.readline() + watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=20)
        assert looked.is_set()
        assert watching.returncode == 130
        assert err == (
            f"job {job_id} goes on: `llamahome watch {job_id}` looks again, "
            f"`llamahome cancel {job_id}` ends it\n"
        )
        assert client.job(job_id).state is JobState.accepted
