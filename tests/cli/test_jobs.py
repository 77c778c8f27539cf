from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llamahome.schemas import JobState

from .conftest import Gateway, RunCommand
from .things import attempt, report, run


def test_submit_prints_the_id_and_nothing_else(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    ran = llamahome(
        "submit", rows, "--base", "tiny", "--recipe", "quick", "--suffix", "mine",
        "--set", "lora.r=16", "--set", "lora.alpha=32", "--set", "learning_rate=5e-5",
    )  # fmt: skip
    (job_id,) = gateway.fake.jobs
    assert (ran.code, ran.out, ran.err) == (0, f"{job_id}\n", "")
    job = gateway.fake.jobs[job_id]
    assert job["x_config"] == {"lora": {"r": 16, "alpha": 32}, "learning_rate": "5e-5"}
    assert job["user_provided_suffix"] == "mine"
    assert list(gateway.fake.uploads.values()) == [rows.read_bytes()]


def test_submit_with_a_validation_file_uploads_both(
    gateway: Gateway, llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("{}\n{}\n")
    ran = llamahome("submit", rows, "--base", "tiny", "--validation", held_out, "--json")
    assert ran.code == 0
    assert gateway.fake.uploads[ran.json["validation_file"]] == held_out.read_bytes()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("learning_rat=1", "learning_rat: unknown key. Did you mean 'learning_rate'?"),
        ("epochs", "'epochs' is not key=value"),
        ("epochs=0", "epochs"),
        ("lora.r=big", "lora.r"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_uploaded(
    gateway: Gateway, llamahome: RunCommand, rows: Path, assignment: str, said: str
) -> None:
    ran = llamahome("submit", rows, "--base", "tiny", "--set", assignment)
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.err
    assert gateway.fake.uploads == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("submit", "none.jsonl", "--base", "tiny"), "none.jsonl: no such file"),
        (("submit", "rows.jsonl", "--base", "big"), "Model big is not available"),
        (("show", "ftjob-nope"), "Could not find fine tune: ftjob-nope"),
        (("watch", "ftjob-nope"), "Could not find fine tune: ftjob-nope"),
        (("cancel", "../x"), "'../x' is no job id"),
    ],
)
def test_a_wrong_name_is_one_line_and_exit_1(
    gateway: Gateway, llamahome: RunCommand, rows: Path, words: tuple[str, ...], said: str
) -> None:
    ran = llamahome(*words)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert said in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("bogus",), ("submit", "f"), ("submit",), ("jobs", "--limit", "0"), ("worker", "cooking"),
        ("jobs", "--nope"), ("keys", "create"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(llamahome: RunCommand, words: tuple[str, ...]) -> None:
    ran = llamahome(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert "--help" in ran.err


def test_a_gateway_that_is_gone_is_exit_3_and_names_its_url(
    gateway: Gateway, llamahome: RunCommand
) -> None:
    gateway.fake.break_down(times=50, status=503)
    ran = llamahome("jobs")
    assert ran.code == 3
    assert gateway.url in ran.err


def test_a_wrong_key_is_exit_1(
    gateway: Gateway, llamahome: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_URL", gateway.url)
    monkeypatch.setenv("LLAMAHOME_KEY", "llh-wrong")
    ran = llamahome("jobs")
    assert ran.code == 1
    assert "Incorrect API key" in ran.err
    assert "llh-wrong" not in ran.err


def _submit(llamahome: RunCommand, rows: Path) -> str:
    return llamahome("submit", rows, "--base", "tiny").out.strip()


def test_jobs_lists_newest_first_without_ansi(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    first, second = _submit(llamahome, rows), _submit(llamahome, rows)
    gateway.fake.advance(first, "running", progress={"done": 30, "total": 120})
    ran = llamahome("jobs")
    lines = ran.out.splitlines()
    assert lines[0].split() == ["JOB", "STATE", "PROGRESS", "AGE", "BASE", "MODEL"]
    assert lines[1].split()[:3] == [second, "accepted", "-"]
    assert lines[2].split()[:4] == [first, "running", "25", "%"]
    assert "\x1b" not in ran.out
    page = llamahome("jobs", "--limit", "1", "--after", second, "--json").json
    assert [job["id"] for job in page] == [first]


def test_no_jobs_is_a_header_and_an_empty_list(gateway: Gateway, llamahome: RunCommand) -> None:
    assert llamahome("jobs").out.startswith("JOB  STATE")
    assert llamahome("jobs", "--json").json == []


@pytest.mark.parametrize(
    ("verb", "state"), [("cancel", "cancelled"), ("pause", "paused"), ("resume", "queued")]
)
def test_verbs_answer_the_new_state(
    gateway: Gateway, llamahome: RunCommand, rows: Path, verb: str, state: str
) -> None:
    job_id = _submit(llamahome, rows)
    if verb == "resume":
        gateway.fake.advance(job_id, "paused")
    ran = llamahome(verb, job_id)
    assert (ran.code, ran.out) == (0, f"{job_id} {state}\n")
    again = llamahome(verb, job_id, "--json")
    assert (again.code, again.json["state"]) == (0, state)


def test_retry_prints_the_new_jobs_id(gateway: Gateway, llamahome: RunCommand, rows: Path) -> None:
    job_id = _submit(llamahome, rows)
    assert llamahome("retry", job_id).code == 1
    gateway.fake.advance(job_id, "failed")
    new = llamahome("retry", job_id).out.strip()
    assert gateway.fake.jobs[new]["x_retry_of"] == job_id


def test_fetch_writes_the_adapter_and_refuses_an_occupied_folder(
    gateway: Gateway, llamahome: RunCommand, rows: Path, tmp_path: Path
) -> None:
    job_id = _submit(llamahome, rows)
    assert llamahome("fetch", job_id, tmp_path / "a").code == 1
    gateway.fake.advance(job_id, "succeeded", artifacts={"adapter_model.safetensors": b"123"})
    ran = llamahome("fetch", job_id, tmp_path / "a", "--json")
    assert ran.code == 0
    assert ran.json["folder"] == str(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == b"123"
    occupied = llamahome("fetch", job_id, tmp_path / "a")
    assert occupied.code == 1
    assert "is not empty" in occupied.err


def test_watch_exits_0_only_for_a_job_that_succeeded(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    good, bad = _submit(llamahome, rows), _submit(llamahome, rows)
    gateway.fake.advance(good, "succeeded")
    gateway.fake.advance(bad, "failed")
    assert llamahome("watch", good).code == 0
    failed = llamahome("watch", bad)
    assert failed.code == 1
    assert "internal_error: the test says so" in failed.out


def test_watch_as_json_is_one_object_a_line(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    job_id = _submit(llamahome, rows)
    gateway.fake.advance(job_id, "cancelled")
    ran = llamahome("watch", job_id, "--json")
    assert ran.code == 1
    (update,) = [json.loads(line) for line in ran.out.splitlines()]
    assert (update["job"]["id"], update["job"]["state"]) == (job_id, "cancelled")
    assert [event["message"] for event in update["events"]][-1] == "The job is cancelled"


@pytest.mark.parametrize(("end", "code"), [("succeeded", 0), ("failed", 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_submit_and_wait_watches_on_stderr_and_keeps_stdout_for_the_answer(
    gateway: Gateway, llamahome: RunCommand, rows: Path, end: str, code: int, as_json: bool
) -> None:
    def end_it(path: str) -> None:
        if path.endswith("/runs"):
            (job_id,) = gateway.fake.jobs
            if not JobState(gateway.fake.jobs[job_id]["x_state"]).terminal:
                gateway.fake.advance(job_id, end)

    gateway.before_answer = end_it
    words = ["submit", rows, "--base", "tiny", "--wait", *(["--json"] if as_json else [])]
    ran = llamahome(*words)
    (job_id,) = gateway.fake.jobs
    assert ran.code == code
    if as_json:
        assert (ran.json["id"], ran.json["state"]) == (job_id, end)
    else:
        assert ran.out == f"{job_id}\n"
    assert f"{job_id} {end}" in ran.err


def test_show_tells_each_attempt_the_error_and_where_to_look_further(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    job_id = _submit(llamahome, rows)
    gateway.fake.advance(job_id, "failed")
    lost = attempt(1, outcome="lost", error={"code": "worker_lost", "message": "pid 7 is gone"})
    runs = [run(attempts=(lost, attempt(2, run_seconds=62.0, cached=True))), run(shard=1)]
    path = f"/v1/fine_tuning/jobs/{job_id}/runs"
    gateway.lists[path] = [one.model_dump(mode="json") for one in runs]
    ran = llamahome("show", job_id)
    assert ran.code == 0
    table = [line.split() for line in ran.out.splitlines() if line.startswith("validation  ")]
    assert table == [
        ["validation", "shard", "0", "done", "validation-host-7", "host", "1", "0.25", "s",
         "1.5", "s", "lost"],
        ["validation", "shard", "0", "done", "validation-host-7", "host", "2", "0.25", "s",
         "1", "m", "02", "s", "succeeded", "(cached)"],
        ["validation", "shard", "1", "done", "-", "-", "-", "-", "-", "-"],
    ]  # fmt: skip
    assert "failed: internal_error: the test says so" in ran.out
    assert "attempt 1: worker_lost: pid 7 is gone" in ran.out
    assert f"`llamahome retry {job_id}`" in ran.out


def test_show_of_a_succeeded_job_has_the_reports_numbers(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    job_id = _submit(llamahome, rows)
    proof = report().model_dump(mode="json")
    gateway.fake.advance(job_id, "succeeded", report=proof)
    ran = llamahome("show", job_id, "--state", Path(".llamahome"))
    for part in (
        "12: 10 valid, 2 bad_json, 1 duplicates",
        "8 training rows (400 of 1,000 tokens trained), 1 validation rows, 1 too_long, 3 truncated",
        "5.123 -> 3.21, best 3.2 at step 20",
        "30 steps, 3 epochs, 1,200 tokens, 4,096 parameters, fp32, fast",
        "the base is unchanged, the adapter moved",
        "step 10",
        f"`llamahome fetch {job_id} DIR --state .llamahome`",
    ):
        assert part in ran.out
    shown = llamahome("show", job_id, "--json").json
    assert (shown["job"]["id"], shown["report"], shown["runs"]) == (job_id, proof, [])


def test_models_lists_bases_and_what_was_made_of_them(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    gateway.fake.advance(_submit(llamahome, rows), "succeeded")
    listed = [line.split() for line in llamahome("models").out.splitlines()]
    assert listed[1] == ["tiny", "base", "-"]
    assert listed[2][1:] == ["fine-tuned", "tiny"]
    assert [model["id"] for model in llamahome("models", "--json").json][0] == "tiny"


def test_ps_asks_the_gateway_where_no_ledger_is_named(
    gateway: Gateway, llamahome: RunCommand
) -> None:
    gateway.lists["/v1/fleet/workers"] = [
        {
            "id": "training-host-7-ab", "role": "training", "host": "host", "pid": 7,
            "state": "busy", "version": "0.1.0", "started_at": 1.0, "heartbeat_at": 2.0,
            "heartbeat_age_seconds": 2.5, "metrics_port": 9100, "slots": 1, "holds": ["run-1"],
            "info": {},
        }
    ]  # fmt: skip
    ran = llamahome("ps")
    assert ran.out.splitlines()[1].split() == [
        "training", "7", "host", "busy", "2.5", "s", "ago", "1", "run-1", ":9100",
    ]  # fmt: skip
    assert llamahome("ps", "--json").json[0]["holds"] == ["run-1"]


def test_a_reader_that_goes_away_is_no_error_to_be_shown(
    gateway: Gateway, llamahome: RunCommand, rows: Path
) -> None:
    for _ in range(3):
        _submit(llamahome, rows)
    command = f"{sys.executable} -m llamahome.cli jobs | true"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("", "")
