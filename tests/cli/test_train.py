"""`llamahome train` end to end: stopped, killed, corrupted, it ends with the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamahome.cli.exits import EndedWith
from llamahome.errors import Unavailable
from llamahome.local.folder import held

from .conftest import RunCommand

pytestmark = pytest.mark.model

WEIGHTS = "adapter_model.safetensors"
SETTINGS = (
    "epochs=3", "batch_size=2", "gradient_accumulation_steps=1", "warmup_steps=2", "fp16=false",
    "learning_rate=0.005", "lora.r=4", "early_stopping.enabled=false", "validation_split=0.1",
    "checkpointing.save_strategy=steps", "checkpointing.save_steps=5",
)  # fmt: skip
STEPS = 3 * 27  # 60 rows, 54 of them for training
SECONDS = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and rows to train it on."""
    from llamahome.training import make_tiny

    folder = tmp_path_factory.mktemp("train")
    make_tiny(folder / "base", steps=0)
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]}
        for n in range(60)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(place: Path, out: Path, *more: str, settings: tuple[str, ...] = SETTINGS) -> list[str]:
    sets = [word for setting in settings for word in ("--set", setting)]
    return [
        "train", str(place / "rows.jsonl"), "--base", str(place / "base"), "--out", str(out),
        *sets, *more,
    ]  # fmt: skip


@contextlib.contextmanager
def running(place: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own; nothing of it is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llamahome.cli", *words(place, out, *more)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "LLAMAHOME_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def checkpoints(out: Path, attempt: str = "f*") -> list[Path]:
    """Complete ones, the oldest first."""
    found = out.glob(f"checkpoints/jobs/*/runs/*/{attempt}/checkpoint-*/MANIFEST.json")
    return sorted((path.parent for path in found), key=lambda path: path.name)


def await_checkpoint(out: Path, process: subprocess.Popen[str], attempt: str = "f*") -> None:
    until = time.monotonic() + SECONDS
    while len(checkpoints(out, attempt)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no checkpoint in time"
        time.sleep(0.02)


def engines(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


Train = Callable[..., Any]


@pytest.fixture
def train(llamahome: RunCommand, monkeypatch: pytest.MonkeyPatch) -> Train:
    """The command in this process, on one thread."""
    monkeypatch.setenv("LLAMAHOME_THREADS", "1")
    return lambda place, out, *more, **keywords: llamahome(*words(place, out, *more, **keywords))


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """The folder of a run that nobody disturbed."""
    out = place / "undisturbed"
    with running(place, out, "--json") as process:
        answer, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, log
    body = json.loads(answer)
    assert (body["adapter"], body["trained"], body["steps"]) == (str(out / "adapter"), True, STEPS)
    assert answer.count("\n") == 1
    assert "training: Fine-tuning job started" in log
    return out


def weights(out: Path) -> bytes:
    return (out / "adapter" / WEIGHTS).read_bytes()


def test_the_adapter_is_complete_and_nothing_else_looks_like_one(undisturbed: Path) -> None:
    assert {
        WEIGHTS, "adapter_config.json", "tokenizer.json", "training_config.yaml", "report.json",
        "training_metrics.json", "history.jsonl", "README.md",
    } <= {path.name for path in (undisturbed / "adapter").iterdir()}  # fmt: skip
    outside = [
        path.relative_to(undisturbed)
        for path in undisturbed.rglob("*.safetensors")
        if not any("checkpoint" in part for part in path.relative_to(undisturbed).parts)
    ]
    assert outside == [Path("adapter") / WEIGHTS]
    assert len(checkpoints(undisturbed)) == 3
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "jobs", "run.json",
    ]  # fmt: skip


def test_a_finished_folder_is_refused_or_accepted_as_done(
    train: Train, place: Path, undisturbed: Path
) -> None:
    before = weights(undisturbed)
    again = train(place, undisturbed)
    assert (again.code, again.out) == (2, "")
    assert "holds a finished adapter" in again.err
    accepted = train(place, undisturbed, "--resume", "--json")
    assert (accepted.code, accepted.json["trained"]) == (0, False)
    assert "done already" in accepted.err
    other = train(place, undisturbed, "--resume", "--set", "seed=7")
    assert other.code == 2
    assert "another seed (42, now 7)" in other.err
    assert weights(undisturbed) == before


def test_killed_in_the_middle_and_resumed_it_ends_with_the_same_bytes(
    train: Train, place: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(place, out) as process:
        await_checkpoint(out, process)
        for engine in engines(process):
            engine.kill()  # it is started again, by itself
        await_checkpoint(out, process, "f2")
        below = engines(process)
        os.killpg(process.pid, signal.SIGKILL)
        _, log = process.communicate()
    assert "was killed by signal 9 (SIGKILL)" in log
    assert "Going on from step" in log
    assert below
    assert gone(below)
    assert not (out / "adapter").exists()
    other = train(place, out, "--resume", settings=(*SETTINGS, "lora.r=8"))
    assert other.code == 2
    assert "another lora.r (4, now 8)" in other.err
    # The newest is damaged: the one before serves.
    newest = checkpoints(out)[-1] / "adapter.safetensors"
    newest.chmod(0o644)
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")

    resumed = train(place, out, "--resume", "--json")

    assert resumed.code == 0, resumed.err
    assert "is corrupt and is not used" in resumed.err
    assert resumed.json["resumed_from"]
    assert weights(out) == weights(undisturbed)
    assert len(checkpoints(out)) == 3


@pytest.mark.parametrize("point", ["before_pointer", "after_pointer"])
def test_dead_around_the_moment_a_checkpoint_is_pointed_to_it_ends_with_the_same_bytes(
    place: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Here the supervising process dies, between publishing a checkpoint and naming it."""
    out, flag = tmp_path / "out", tmp_path / "crashed"
    with monkeypatch.context() as crash:
        crash.setenv("LLAMAHOME_CRASH_AT", f"{point}:2@{flag}")
        with running(place, out) as process:
            assert process.wait(SECONDS) == -signal.SIGKILL
    assert flag.exists()

    with running(place, out, "--resume", "--json") as process:
        answer, complaint = process.communicate(timeout=SECONDS)

    assert process.returncode == 0, complaint
    assert weights(out) == weights(undisturbed)
    assert json.loads(answer)


def test_ctrl_c_saves_says_how_to_go_on_and_leaves_no_child(
    train: Train, llamahome: RunCommand, place: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """BEHAVIOUR 63: no orphan is left. The line that says how can be pasted."""
    out = tmp_path / "an $out"
    with running(place, out, "--") as process:
        await_checkpoint(out, process)
        below = engines(process)
        locked = train(place, out)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, log
    assert f"another run works in it (pid {process.pid} on " in locked.err
    assert locked.code == 2
    again = shlex.split(log.rstrip().rpartition("Go on with: ")[2])
    assert again[:2] == ["llamahome", "train"]
    assert gone(below)
    assert not (out / "checkpoints" / "scratch").exists()

    resumed = llamahome(*again[1:])

    assert resumed.code == 0, resumed.err
    assert weights(out) == weights(undisturbed)


def test_a_folder_is_configured_by_its_name(
    llamahome: RunCommand, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / "training_config.yaml").write_text("model_configs: {base: {seed: -1}}")
    for base in (base_folder, "./base", "base", "base/../base"):
        ran = llamahome("train", rows, "--base", base, "--out", tmp_path / "out")
        assert ran.code == 2
        assert "model_configs.base, seed: " in ran.err
    ran = llamahome("inspect", rows, "--base", "./base")
    assert "model_configs.base, seed: " in ran.err


def test_watched_by_callbacks_in_this_process_it_has_the_same_bytes(
    place: Path, undisturbed: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    from llamahome.config import Settings, parse_assignments, resolve_training_config
    from llamahome.local import base_of_folder, train_files

    steps: list[int] = []

    class Seen(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    config = resolve_training_config(layers=[("test", parse_assignments(SETTINGS))])
    base, out = base_of_folder(place / "base"), tmp_path / "out"

    done = train_files(
        [place / "rows.jsonl"], base, out, config=config, callbacks=[Seen],
        settings=Settings(threads=1, device="cpu"),
    )  # fmt: skip

    assert done.trained
    assert weights(out) == weights(undisturbed)
    assert steps[0] == 5
    assert steps[-1] == STEPS == done.report.training.steps
    assert len(checkpoints(out)) == 3


def test_without_resume_an_unfinished_run_is_set_aside_and_a_failed_one_brings_it_back(
    train: Train, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    saved = out / "checkpoints" / "jobs" / "local" / "runs" / "training-train-0" / "f1"
    (saved / "checkpoint-00000005").mkdir(parents=True)
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    argv = words(place, out)
    argv[1] = str(tmp_path / "bad.jsonl")

    from llamahome.cli.app import run

    assert run(argv) == 2
    assert (saved / "checkpoint-00000005").is_dir()
    assert not (out / "checkpoints.earlier").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"FILE": "missing.jsonl"}, ("missing.jsonl", "no such file")),
        ({"FILE": "bad.jsonl"}, ("bad.jsonl:1: Expecting value", "`llamahome validate FILE`")),
        ({"FILE": "empty.jsonl"}, ("empty.jsonl", "the file is empty")),
        ({"FILE": "."}, ("is no regular file",)),
        ({"--base": "nosuch"}, ("'nosuch' is neither a folder nor a registered base",)),
        ({"--base": "."}, ("holds no config.json",)),
        ({"--set": "epoch=1"}, ("epoch", "unknown key", "Did you mean 'epochs'?")),
        ({"--set": "epochs=0"}, ("epochs", "greater than or equal to 1")),
        ({"--recipe": "nosuch"}, ("unknown recipe 'nosuch'",)),
        ({"--out": "empty.jsonl"}, ("is no folder",)),
        ({"--set": "lora.target_modules=[query]"}, ("no linear layer 'query'", "q_proj")),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_with_exit_code_2_and_leaves_nothing(
    llamahome: RunCommand, place: Path, tmp_path: Path, change: dict[str, str], told: tuple[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": [}\nno JSON\n')
    (tmp_path / "empty.jsonl").touch()
    given = {"FILE": str(place / "rows.jsonl"), "--base": str(place / "base"), "--out": "out"}
    given |= change
    before = {path.name for path in tmp_path.iterdir()}

    ran = llamahome("train", given.pop("FILE"), *(word for pair in given.items() for word in pair))

    assert (ran.code, ran.out) == (2, ""), ran.err
    for text in told:
        assert text in ran.err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_registered_base_is_taken_by_its_name(
    llamahome: RunCommand, place: Path, tmp_path: Path
) -> None:
    from llamahome.cli import train as command
    from llamahome.cli.context import direct_settings

    state = tmp_path / "state"
    assert llamahome("models", "add", "mine", place / "base", "--state", state).code == 0

    base = command._base("mine", direct_settings(state))

    assert (base.name, base.path) == ("mine", str(place / "base"))
    folder = command._base(str(place / "base"), direct_settings(None))
    assert (folder.name, folder.digest) == ("base", base.digest)
    ran = llamahome("train", place / "rows.jsonl", "--base", "mina", "--out", "o", "--state", state)
    assert ran.code == 2
    assert "mine" in ran.err


def test_a_full_disk_ends_with_1_and_a_service_that_is_away_with_3() -> None:
    from llamahome.cli import train as command
    from llamahome.cli.exits import exit_code

    for error, code in (
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (Unavailable("full", code="storage_full"), 1),
        (Unavailable("full", code="disk_full"), 1),
        (Unavailable("away"), 3),
    ):
        with pytest.raises((EndedWith, Unavailable)) as caught, command._exit_codes():
            raise error
        assert exit_code(caught.value) == code


def test_a_dead_runs_lock_never_blocks_and_an_empty_folder_does_not_stay(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with held(out):
        assert (out / ".lock").is_file()
    assert not out.exists()
    out.mkdir()
    (out / ".lock").write_text("pid 1 on another\n")
    with held(out) as folder:
        assert folder.lockable


def test_training_goes_on_from_an_earlier_adapter_with_its_own_lora(
    train: Train, place: Path, undisturbed: Path, tmp_path: Path
) -> None:
    earlier = undisturbed / "adapter"
    before = json.loads((earlier / "report.json").read_text())["training"]
    more = ("--adapter", str(earlier), "--set", "epochs=1", "--json")
    ran = train(place, tmp_path / "out", *more, settings=("fp16=false", "warmup_steps=0"))
    assert ran.code == 0, ran.err
    assert ran.json["eval_loss_before"] == before["eval_loss_after"]
    other = train(place, tmp_path / "other", *more, settings=("lora.r=8",))
    assert (other.code, other.out) == (2, "")
    assert "lora.r: is 8, but the adapter 'adapter' was trained with 4" in other.err


def test_a_folder_checkpoints_of_somebody_else_is_left_alone(
    llamahome: RunCommand, place: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "out" / "checkpoints" / "mine" / "weights"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    ran = llamahome(*words(place, tmp_path / "out"))
    assert ran.code != 0
    assert "checkpoints" in ran.err
    assert theirs.read_text() == "precious"
