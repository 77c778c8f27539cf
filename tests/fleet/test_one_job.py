"""One job, all the way, through real processes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from llamahome.client import Client
from support.fleet import Fleet

SMALL = ["--recipe", "quick", "--set", "epochs=1", "--set", "max_length=128"]
SMALL_CONFIG = {"epochs": 1, "max_length": 128}


def _client(fleet: Fleet) -> Client:
    endpoint = fleet.endpoint()
    return Client(endpoint["url"], endpoint["key"])


def _file_ids(fleet: Fleet) -> list[str]:
    endpoint = fleet.endpoint()
    request = urllib.request.Request(
        f"{endpoint['url']}/v1/files", headers={"Authorization": f"Bearer {endpoint['key']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return [file["id"] for file in json.load(answer)["data"]]


def _adapter_digest(fleet: Fleet, job_id: str, into: Path) -> str:
    done = fleet.run("fetch", job_id, str(into))
    assert done.returncode == 0, done.stderr
    return hashlib.sha256((into / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_three_ways_to_submit_give_three_equal_jobs(
    fleet: Fleet, data: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 80: by command line, by Python client, and by Celery from foreign code."""
    by_cli = fleet.run("submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL)
    assert by_cli.returncode == 0, by_cli.stderr
    jobs = [by_cli.stdout.strip()]
    with _client(fleet) as client:
        client.wait(jobs[0], timeout=200)  # so that there is something to find in the cache
        jobs.append(
            client.submit(data / "train.jsonl", base="tiny", recipe="quick", config=SMALL_CONFIG).id
        )
        _send_by_bare_celery(fleet, data)
        jobs.append(_job_of_submission(client, "from-a-stranger"))
        ended = [client.wait(job, timeout=200) for job in jobs]
    assert [(job.state, job.error) for job in ended] == [("succeeded", None)] * 3
    digests = {_adapter_digest(fleet, job, tmp_path / job) for job in jobs}
    assert len(digests) == 1, "the same data, base, settings and seed must give the same bytes"
    first, *others = (fleet.json("show", job) for job in jobs)
    assert len(first["runs"]) >= 5
    for other in others:
        for run in other["runs"]:
            # The ten-example minimum is the gateway's alone, so the close step may differ.
            if run["stage"] != "training" and run["step"] != "close":
                assert run["attempts"][-1]["cached"], "equal work must not be done twice"


def _send_by_bare_celery(fleet: Fleet, data: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from celery import Celery
        app = Celery(broker=sys.argv[1])
        message = {
            "v": 1, "submission_id": "from-a-stranger", "api_key": sys.argv[2], "model": "tiny",
            "training_file": sys.argv[3], "recipe": "quick",
            "config": {"epochs": 1, "max_length": 128},
        }
        for _ in range(2):  # sending twice must be harmless
            app.send_task("llamahome.submit", queue="llamahome.submissions", kwargs=message)
        assert not [name for name in sys.modules if name.startswith("llamahome")]
        """
    )
    from llamahome.config import load_settings

    broker = load_settings(state=fleet.state).redis
    subprocess.run(
        [
            sys.executable, "-c", script, broker, fleet.endpoint()["key"],
            f"file://{data}/train.jsonl",
        ],
        check=True,
        timeout=60,
    )  # fmt: skip


def _job_of_submission(client: Client, submission_id: str) -> str:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = [job for job in client.jobs(limit=20) if job.submission_id == submission_id]
        if found:
            assert len(found) == 1
            return found[0].id
        time.sleep(0.2)  # another process takes the message; there is nothing here to wait on
    raise AssertionError("the submission never became a job")


def test_show_tells_which_process_did_what(fleet: Fleet, data: Path) -> None:
    other = ["--set", "seed=7", "--set", "validation.max_messages=999"]  # nothing from the cache
    words = ["submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL, *other, "--wait"]
    done = fleet.run(*words)
    assert done.returncode == 0, done.stderr
    shown = fleet.json("show", done.stdout.strip())
    workers: dict[str, set[int]] = {}
    for run in shown["runs"]:
        attempt = run["attempts"][-1]
        assert attempt["outcome"] == "succeeded"
        assert attempt["number"] >= 1
        assert attempt["host"]
        assert attempt["queue_wait_seconds"] >= 0
        assert attempt["run_seconds"] > 0
        assert attempt["worker"].startswith(run["stage"])
        workers.setdefault(run["stage"], set()).add(attempt["pid"])
    assert set(workers) == {"validation", "preprocessing", "training"}
    everybody = set().union(*workers.values())
    assert len(everybody) == sum(len(pids) for pids in workers.values()), "a process of two stages"
    in_table = fleet.run("show", done.stdout.strip())
    for run in shown["runs"]:
        assert str(run["attempts"][-1]["pid"]) in in_table.stdout or run["stage"] in in_table.stdout


def test_the_published_adapter_loads_in_peft_and_changes_the_logits(
    fleet: Fleet, data: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = fleet.run("submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL, "--wait")
    assert done.returncode == 0, done.stderr
    _adapter_digest(fleet, done.stdout.strip(), tmp_path / "adapter")
    base_folder = fleet.state / "bases" / "tiny"
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    ids = tokenizer("Where are bad rows kept?", return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert (before - after).abs().max() > 1e-3
    report = json.loads((tmp_path / "adapter" / "report.json").read_text())
    assert report["preparation"]["rows_in"] == 120
    assert report["training"]["base_unchanged"]
    assert report["training"]["adapter_moved"]
    assert report["training"]["eval_loss_after"] < report["training"]["eval_loss_before"]


def test_a_killed_training_worker_costs_time_and_nothing_else(
    fleet: Fleet, data: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle: the job succeeds, exactly once, with the undisturbed run's bytes."""
    words = ["submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL,
             "--set", "epochs=3", "--set", "checkpointing.save_strategy=steps",
             "--set", "checkpointing.save_steps=3"]  # fmt: skip
    undisturbed = fleet.run(*words, "--wait")
    assert undisturbed.returncode == 0, undisturbed.stderr
    job = fleet.run(*words).stdout.strip()
    with _client(fleet) as client:
        _until(lambda: (p := client.job(job).progress) is not None and p.stage == "training"
               and p.done >= 4, 120, f"{job} never reached step 4")  # fmt: skip
        before = fleet.process_of("worker", "training")
        engines = before.children(recursive=True)
        before.send_signal(signal.SIGKILL)
        ended = client.wait(job, timeout=200)
        messages = [event.message for event in client.events(job)]
    assert ended.state == "succeeded"
    assert not [engine for engine in engines if engine.is_running()], (
        "an engine outlived its worker"
    )
    assert messages.count("The job has successfully completed") == 1
    training = [r for r in fleet.json("show", job)["runs"] if r["stage"] == "training"][0]
    assert [a["outcome"] for a in training["attempts"]] == ["lost", "succeeded"]
    same = {
        _adapter_digest(fleet, name, tmp_path / name) for name in (job, undisturbed.stdout.strip())
    }
    assert len(same) == 1


def _until(done: Any, seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)  # polling another process over HTTP


def test_a_job_can_be_cancelled_while_it_trains(fleet: Fleet, data: Path) -> None:
    job = fleet.run("submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL,
                    "--set", "epochs=50").stdout.strip()  # fmt: skip
    with _client(fleet) as client:
        _until(lambda: client.job(job).state == "running", 120, f"{job} never ran")
        assert fleet.run("cancel", job).returncode == 0
        assert client.job(job).state == "cancelled"
        _until(lambda: not [w for w in client.workers() if w.role == "training" and w.holds], 30,
               "the training worker still holds the cancelled run")  # fmt: skip
    again = fleet.run("submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL, "--wait")
    assert again.returncode == 0, "the worker must be able to go on"


def test_a_paused_training_saves_lets_go_and_goes_on(fleet: Fleet, data: Path) -> None:
    words = ["submit", str(data / "train.jsonl"), "--base", "tiny", *SMALL, "--set", "epochs=3"]
    job = fleet.run(*words, "--set", "seed=11").stdout.strip()
    with _client(fleet) as client:
        _until(lambda: (p := client.job(job).progress) is not None and p.stage == "training"
               and p.done >= 2, 120, f"{job} never reached step 2")  # fmt: skip
        assert fleet.run("pause", job).returncode == 0
        _until(lambda: client.job(job).state == "paused", 60, f"{job} never paused")
        assert not [w for w in client.workers() if w.role == "training" and w.holds]
        assert fleet.run("resume", job).returncode == 0
        assert client.wait(job, timeout=200).state == "succeeded"
        (resumed,) = client.report(job).training.resumed_from
    assert resumed >= 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["none.jsonl", "--base", "tiny"], "none.jsonl"),
        (["empty.jsonl", "--base", "tiny"], "empty.jsonl"),
        (["train.jsonl", "--base", "tinny"], "Did you mean 'tiny'"),
        (
            ["train.jsonl", "--base", "tiny", "--set", "lerning_rate=1"],
            "Did you mean 'learning_rate'",
        ),
        (["train.jsonl", "--base", "tiny", "--set", "epochs=0"], "epochs"),
        (["train.jsonl", "--base", "tiny", "--recipe", "quik"], "Did you mean 'quick'"),
    ],
)
def test_bad_input_is_one_line_naming_the_thing_and_the_remedy(
    fleet: Fleet, data: Path, words: list[str], text: str
) -> None:
    (data / "empty.jsonl").touch()
    with _client(fleet) as client:
        before = (len(client.jobs(limit=100)), _file_ids(fleet))
    done = fleet.run("submit", str(data / words[0]), *words[1:])
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert text in lines[0]
    with _client(fleet) as client:
        assert (len(client.jobs(limit=100)), _file_ids(fleet)) == before, (
            "something half-made stays"
        )


def test_a_file_that_is_no_jsonl_fails_with_its_line_and_keeps_a_quarantine(
    fleet: Fleet, data: Path
) -> None:
    (data / "broken.jsonl").write_text("this is no JSON\n" * 12)
    done = fleet.run("submit", str(data / "broken.jsonl"), "--base", "tiny", "--wait")
    assert done.returncode == 1
    assert "broken.jsonl" in done.stderr
    shown = fleet.run("show", done.stdout.strip())
    assert "broken.jsonl" in shown.stdout


def test_every_process_serves_metrics_and_the_counts_equal_the_records(fleet: Fleet) -> None:
    """BEHAVIOUR 80: Prometheus counts equal the records."""
    coordinator = next(w for w in fleet.json("ps") if w["role"] == "coordinator")
    with urllib.request.urlopen(
        f"http://127.0.0.1:{coordinator['metrics_port']}/sd", timeout=5
    ) as answer:
        groups = json.load(answer)
    roles = {group["labels"]["role"] for group in groups}
    assert roles >= {
        "coordinator", "gateway", "validation", "preprocessing", "training", "submissions",
    }  # fmt: skip
    for group in groups:
        for target in group["targets"]:
            port = target.rsplit(":", 1)[1]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                assert b"llamahome_worker_info" in answer.read()
    with urllib.request.urlopen(
        f"http://127.0.0.1:{coordinator['metrics_port']}/metrics", timeout=5
    ) as answer:
        page = answer.read().decode()
    succeeded = [job for job in fleet.json("jobs") if job["state"] == "succeeded"]
    assert f'llamahome_jobs{{state="succeeded"}} {float(len(succeeded))}' in page
    assert "llamahome_broker_up 1.0" in page


def test_the_doctor_finds_a_running_fleet_well(fleet: Fleet) -> None:
    done = fleet.run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_openai_client_can_do_the_same(fleet: Fleet, data: Path) -> None:
    from openai import OpenAI

    endpoint = fleet.endpoint()
    client = OpenAI(base_url=f"{endpoint['url']}/v1", api_key=endpoint["key"])
    with (data / "train.jsonl").open("rb") as stream:
        file = client.files.create(file=stream, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 1}
    )
    _until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 200,
           "the job never ended")  # fmt: skip
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert (ended.status, ended.error) == ("succeeded", None)
    assert ended.fine_tuned_model is not None
    assert ended.fine_tuned_model.startswith("ft:tiny:")
