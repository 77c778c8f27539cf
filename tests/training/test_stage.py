"""The stage with a real engine process, on a CPU."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from llamahome.config import Settings
from llamahome.errors import InvalidConfig, OperatorError, Stopped, WorkerLost
from llamahome.schemas import JobReport, StageResult, StageTask, Step, StopReason, TrainingMetrics
from llamahome.training import key, make_stage, shutdown_engine
from support.processes import engine_processes

# In one group with the other tests of the one warm engine that a process has.
pytestmark = [pytest.mark.model, pytest.mark.xdist_group("engine")]

WEIGHTS = "adapter_model.safetensors"
MakeTask = Callable[..., StageTask]
MakePorts = Callable[..., Any]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    yield Settings(
        scratch=tmp_path_factory.mktemp("engine"), threads=1, device="cpu", drain_seconds=30
    )
    shutdown_engine()


@pytest.fixture
def stage(settings: Settings) -> Callable[[StageTask, Any], StageResult]:
    return make_stage(settings)


Stage = Callable[[StageTask, Any], StageResult]


def engine_pids(parent: int | None = None) -> list[int]:
    return [engine.pid for engine in engine_processes(parent)]


def adapter(result: StageResult) -> Path:
    assert result.artifact is not None
    return Path(result.artifact.path)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def kept() -> dict[str, str]:
    """What the undisturbed job of the first test gave, for those after it."""
    return {}


def undisturbed(stage: Stage, task: StageTask, ports: Any, kept: dict[str, str]) -> dict[str, str]:
    if not kept:
        kept.update(digests(adapter(stage(task, ports))))
    return kept


def test_a_job_ends_with_a_complete_adapter_and_a_report_of_every_stage(
    stage: Stage, make_task: MakeTask, ports: Any, kept: dict[str, str]
) -> None:
    task = make_task()

    result = stage(task, ports)

    folder = adapter(result)
    kept.update(digests(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", WEIGHTS, "history.jsonl", "report.json",
        "tokenizer.json", "training_config.yaml", "training_metrics.json",
    ]  # fmt: skip
    report = JobReport.model_validate_json((folder / "report.json").read_text())
    assert result.summary["report"] == report.model_dump(mode="json")
    assert (report.job_id, report.base) == ("ftjob-1", "test/base")
    assert report.preparation.training.rows == 11
    assert report.validation.total == 14
    assert report.training.base_unchanged
    assert report.training.adapter_moved
    assert set(report.lineage) == {"data", "base", "tokenizer", "template", "config", "code"}
    assert all(len(digest) == 64 for digest in report.lineage.values())
    metrics = json.loads((folder / "training_metrics.json").read_text())
    assert list(metrics) == ["train_loss", "eval_loss", "learning_rate", "epoch", "step"]
    assert TrainingMetrics.model_validate(metrics) == report.training.metrics
    assert (metrics["epoch"], metrics["step"]) == (2, 6)
    config = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert config == {"training": task.spec.config}
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "test/base"
    assert "11 trained on, 3 for validation, of 14 read" in card
    assert result.summary["eval_loss_after"] == report.training.eval_loss_after
    assert result.summary["trained_tokens"] == report.training.trained_tokens


def test_its_checkpoints_were_published_before_the_pointer_moved(
    stage: Stage, make_task: MakeTask, ports: Any
) -> None:
    stage(make_task(), ports)

    assert [point.step for point in ports.points] == [3, 6]
    assert [point.best for point in ports.points] == [True, True]
    assert all(point.eval_loss is not None for point in ports.points)
    assert all((Path(point.artifact.path) / "state.json").is_file() for point in ports.points)
    assert ports.steps_seen[-1] == 6
    assert "Evaluation after epoch 1" in " ".join(ports.messages())


def test_the_engine_stays_warm_and_one_job_leaves_no_trace_in_the_next(
    stage: Stage, make_task: MakeTask, make_ports: MakePorts, kept: dict[str, str]
) -> None:
    expected = undisturbed(stage, make_task(), make_ports("first"), kept)
    (before,) = engine_pids()
    stage(make_task(seed=5, lora={"target_modules": "all-linear"}), make_ports("other"))

    again = stage(make_task(), make_ports("again"))

    assert engine_pids() == [before]
    assert digests(adapter(again)) == expected


def test_the_engine_gives_the_bytes_that_the_loop_gives_in_process(
    stage: Stage,
    make_task: MakeTask,
    make_ports: MakePorts,
    kept: dict[str, str],
    prepared_folder: Path,
) -> None:
    """BEHAVIOUR 80: one implementation, in process and behind the queue."""
    from llamahome.training.data import TokenData
    from llamahome.training.loop import train
    from llamahome.training.runtime import Runtime

    expected = undisturbed(stage, make_task(), make_ports("stage"), kept)

    here = train(
        make_task().spec, TokenData.open(prepared_folder), make_ports("here"),
        runtime=Runtime("cpu", 1),
    )  # fmt: skip

    assert digests(here.folder).items() <= expected.items()


def test_a_wrong_setting_comes_back_as_it_was_raised_and_the_engine_stays(
    stage: Stage, make_task: MakeTask, ports: Any
) -> None:
    with pytest.raises(InvalidConfig, match="no linear layer 'query'") as caught:
        stage(make_task(lora={"target_modules": ["query"]}), ports)

    assert caught.value.place.field == "lora.target_modules"
    assert len(engine_pids()) == 1


def test_a_cancelled_job_ends_at_a_step_and_the_engine_stays_warm(
    stage: Stage, make_task: MakeTask, make_ports: MakePorts, kept: dict[str, str]
) -> None:
    expected = undisturbed(stage, make_task(), make_ports("first"), kept)
    before = engine_pids()

    with pytest.raises(Stopped) as caught:
        stage(make_task(epochs=500), make_ports("cancelled", {1: StopReason.cancel}))

    assert caught.value.code == "cancel"
    assert engine_pids() == before
    assert digests(adapter(stage(make_task(), make_ports("next")))) == expected


def test_a_paused_job_goes_on_later_to_the_same_bytes(
    stage: Stage, make_task: MakeTask, make_ports: MakePorts
) -> None:
    # Long enough that the pause, which travels at its own speed, finds it still running.
    long = {"epochs": 12, "early_stopping": {"enabled": False}}
    expected = digests(adapter(stage(make_task(**long), make_ports("whole"))))
    first = make_ports("first")
    first.stop_at = {step: StopReason.pause for step in range(2, 36)}
    with pytest.raises(Stopped) as caught:
        stage(make_task(**long), first)
    assert caught.value.code == "pause"
    assert 2 <= first.points[-1].step < 36

    second = stage(make_task(resume=first.points[-1], **long), make_ports("second"))

    after = digests(adapter(second))
    assert second.summary["report"]["training"]["resumed_from"] == [first.points[-1].step]
    assert {name for name in after if after[name] != expected[name]} == {"report.json"}


def test_a_supervisor_told_to_exit_saves_and_the_next_one_goes_on_to_the_same_bytes(
    stage: Stage, make_task: MakeTask, make_ports: MakePorts, kept: dict[str, str]
) -> None:
    """BEHAVIOUR 76: SIGTERM saves first."""
    expected = undisturbed(stage, make_task(), make_ports("whole"), kept)
    first = make_ports("first")

    def leave(done: int) -> None:
        if done == 2:
            first.on_progress = lambda done: None
            raise SystemExit(0)

    first.on_progress = leave
    with pytest.raises(SystemExit):
        stage(make_task(), first)
    assert first.points, "no checkpoint was published on the way out"

    second = stage(make_task(resume=first.points[-1]), make_ports("second"))

    assert digests(adapter(second))[WEIGHTS] == expected[WEIGHTS]


def test_a_corrupt_checkpoint_is_told_of_and_training_starts_afresh(
    stage: Stage, make_task: MakeTask, make_ports: MakePorts, kept: dict[str, str]
) -> None:
    expected = undisturbed(stage, make_task(), make_ports("whole"), kept)
    first = make_ports("first")
    stage(make_task(), first)
    point = first.points[0]
    state = Path(point.artifact.path) / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    second = make_ports("second")

    result = stage(make_task(resume=point), second)

    assert digests(adapter(result)) == expected
    assert "is corrupt, training starts afresh" in second.messages("warn")[0]


def test_killed_in_the_middle_it_is_lost_and_a_fresh_engine_ends_with_the_same_bytes(
    stage: Stage, make_task: MakeTask, make_ports: MakePorts, kept: dict[str, str]
) -> None:
    expected = undisturbed(stage, make_task(), make_ports("whole"), kept)
    first = make_ports("first")
    (victim,) = engine_pids()

    def kill(done: int) -> None:
        if first.points:
            os.kill(victim, signal.SIGKILL)

    first.on_progress = kill
    with pytest.raises(WorkerLost, match="signal 9"):
        stage(make_task(), first)
    assert [point.step for point in first.points] == [3]

    second = stage(make_task(resume=first.points[-1]), make_ports("second"))

    assert digests(adapter(second))[WEIGHTS] == expected[WEIGHTS]
    assert engine_pids() != [victim]


def test_a_training_is_never_reused(make_task: MakeTask) -> None:
    assert key(make_task()) is None


def test_a_task_of_another_step_or_without_its_inputs_is_our_mistake(
    stage: Stage, make_task: MakeTask, ports: Any
) -> None:
    task = make_task()

    with pytest.raises(OperatorError, match="no step"):
        stage(task.model_copy(update={"step": Step.close}), ports)
    with pytest.raises(OperatorError, match="preprocessing close"):
        stage(task.model_copy(update={"inputs": ()}), ports)


SUPERVISOR = """\
import importlib.util, json, os, sys
from pathlib import Path
from llamahome.config import Settings
from llamahome.schemas import StageTask
from llamahome.training import make_stage
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
ports = helpers.RecordingPorts(Path(sys.argv[2]))
def tell(done):
    if done == 1:
        heavy = {"torch", "transformers", "peft"} & set(sys.modules)
        print(json.dumps(sorted(heavy)), flush=True)
ports.on_progress = tell
task = StageTask.model_validate_json(sys.stdin.read())
make_stage(Settings(scratch=Path(sys.argv[2]), threads=1, device="cpu"))(task, ports)
"""


def test_the_supervisor_never_loads_torch_hands_on_no_secret_and_takes_its_engine_along(
    make_task: MakeTask, tmp_path: Path
) -> None:
    task = make_task(epochs=5000, early_stopping={"enabled": False})
    helpers = str(Path(__file__).parent / "conftest.py")
    environment = {**os.environ, "LLAMAHOME_LEDGER_URL": "secret", "HF_TOKEN": "secret"}
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, helpers, str(tmp_path / "supervisor")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as supervisor:  # fmt: skip
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        supervisor.stdin.write(task.model_dump_json())
        supervisor.stdin.close()
        assert json.loads(supervisor.stdout.readline()) == []
        (pid,) = engine_pids(supervisor.pid)
        engine = psutil.Process(pid)
        assert "secret" not in engine.environ().values()
        assert os.getsid(pid) == pid
        supervisor.kill()
        died = time.monotonic()
        engine.wait(5)

    assert time.monotonic() - died < 5
    assert not psutil.pid_exists(pid)


def test_importing_the_room_loads_no_torch_and_no_celery() -> None:
    code = (
        "import llamahome.training, llamahome.training.stage, llamahome.training.worker, sys; "
        "print(sorted({'torch', 'transformers', 'peft', 'celery'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_training_worker_takes_one_job_at_a_time(settings: Settings) -> None:
    from llamahome.training.worker import main

    with pytest.raises(InvalidConfig, match="not 2"):
        main(settings, concurrency=2)
