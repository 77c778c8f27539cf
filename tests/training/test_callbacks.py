"""transformers' callbacks watch our runs as they would watch a Trainer's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.errors import Stopped, TrainingFailed
from llamahome.schemas import JobSpec, StopReason
from llamahome.training.data import TokenData
from llamahome.training.ports import TrainedAdapter, TrainPorts

pytestmark = pytest.mark.model

MakeSpec = Callable[..., JobSpec]
MakePorts = Callable[..., Any]
WEIGHTS = "adapter_model.safetensors"
EVENTS = (
    "on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end",
    "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end",
    "on_evaluate", "on_save", "on_log", "on_prediction_step",
)  # fmt: skip


@pytest.fixture
def data(prepared_folder: Path) -> TokenData:
    return TokenData.open(prepared_folder)


def train(spec: JobSpec, data: TokenData, ports: TrainPorts, **keywords: Any) -> TrainedAdapter:
    from llamahome.training.loop import train as real_train
    from llamahome.training.runtime import Runtime

    return real_train(spec, data, ports, runtime=Runtime("cpu", threads=1), **keywords)


def weights(trained: TrainedAdapter) -> bytes:
    return (trained.folder / WEIGHTS).read_bytes()


def recorder(wishes: dict[tuple[str, int], str] | None = None) -> Any:
    """A callback that remembers each event, and sets control flags: (event, step) -> flag."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[Any, ...]] = []
            self.state: Any = None
            self.args: Any = None
            self.gradients: dict[str, list[bool]] = {}

        def take(self, event: str, args: Any, state: Any, control: Any, kwargs: Any) -> None:
            more = tuple(sorted(kwargs["logs"])) if event == "on_log" else ()
            self.seen.append((event, state.global_step, round(state.epoch, 6), *more))
            self.args, self.state = args, state
            if event in ("on_pre_optimizer_step", "on_optimizer_step"):
                groups = kwargs["optimizer"].param_groups
                grads = [bool(p.grad.any()) for group in groups for p in group["params"]]
                self.gradients.setdefault(event, []).append(all(grads))
            if flag := (wishes or {}).get((event, state.global_step)):
                setattr(control, flag, True)

        def names(self) -> list[str]:
            return [event[0] for event in self.seen]

    def method(event: str) -> Any:
        def call(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.take(event, args, state, control, kwargs)

        return call

    for event in EVENTS:
        setattr(Recorder, event, method(event))
    return Recorder()


def transformers_run(base_folder: Path, data: TokenData, out: Path, **arguments: Any) -> Any:
    """A real Trainer on the same rows, in its own order; returns its recorder."""
    import torch
    from torch.utils.data import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

    class Rows(Dataset[Any]):
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            ids, trained = self.rows.row(index)
            ids = torch.from_numpy(np.array(ids)).long()
            labels = torch.where(torch.from_numpy(np.array(trained)), ids, -100)
            pad = 24 - len(ids)
            return {
                "input_ids": torch.nn.functional.pad(ids, (0, pad)),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, pad)),
                "labels": torch.nn.functional.pad(labels, (0, pad), value=-100),
            }

    seen = recorder()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder),
        args=TrainingArguments(
            output_dir=str(out), per_device_train_batch_size=2, per_device_eval_batch_size=2,
            num_train_epochs=2, eval_on_start=True, use_cpu=True, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, save_total_limit=3,
            **{"gradient_accumulation_steps": 2, "logging_steps": 1, **arguments},
        ),  # fmt: skip
        train_dataset=Rows(data.training), eval_dataset=Rows(data.validation), callbacks=[seen],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seen


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        (
            {"eval_steps": 2, "checkpointing": {"save_strategy": "steps", "save_steps": 2}},
            {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        ),
        (
            {"logging": {"steps": 4}, "gradient_accumulation_steps": 3},
            {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 4,
             "gradient_accumulation_steps": 3},
        ),
    ],
    ids=["by epochs", "by steps", "other windows"],
)  # fmt: skip
@pytest.mark.filterwarnings("default")
def test_the_events_are_those_of_a_real_trainer_in_its_order(
    make_spec: MakeSpec,
    data: TokenData,
    ports: Any,
    base_folder: Path,
    tmp_path: Path,
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    expected = transformers_run(base_folder, data, tmp_path / "trainer", **theirs)
    found = recorder()

    train(make_spec(**ours), data, ports, callbacks=[found])

    assert found.seen == expected.seen
    assert found.gradients == expected.gradients
    for name in (
        "global_step", "max_steps", "num_train_epochs", "logging_steps", "train_batch_size",
        "is_local_process_zero", "is_world_process_zero", "is_hyper_param_search",
    ):  # fmt: skip
        assert getattr(found.state, name) == getattr(expected.state, name), name
    assert [sorted(line) for line in found.state.log_history] == [
        sorted(line) for line in expected.state.log_history
    ]


def test_who_only_looks_changes_no_byte_and_sees_true_numbers(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    alone = train(make_spec(), data, make_ports("alone"))
    seen = recorder()

    watched = train(make_spec(), data, make_ports("watched"), callbacks=[seen])

    assert weights(watched) == weights(alone)
    assert watched.report == alone.report
    state, report = seen.state, watched.report
    assert (state.best_metric, state.best_global_step) == (
        report.best_eval_loss, report.best_step,
    )  # fmt: skip
    assert state.num_input_tokens_seen == 2 * int(data.training.lengths.sum())
    logged = [line["loss"] for line in state.log_history if "loss" in line]
    history = (watched.folder / "history.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("train_loss") for line in history]
    assert logged == [loss for loss in losses if loss is not None]
    evaluated = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
    assert (evaluated[0], evaluated[-1]) == (report.eval_loss_before, report.metrics.eval_loss)


def test_a_callback_that_asks_to_stop_ends_the_run_in_order(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    stopper = recorder({("on_step_end", 2): "should_training_stop"})

    report = train(make_spec(epochs=4), data, ports, callbacks=[stopper]).report

    assert report.steps == 2
    assert report.stopped_early == "a callback asked (Recorder), at step 2"
    assert report.eval_loss_after is not None
    assert report.eval_loss_after != report.eval_loss_before
    tail = [name for name in stopper.names() if name != "on_prediction_step"][-7:]
    assert tail == [
        "on_log", "on_epoch_end", "on_log", "on_evaluate", "on_save", "on_log", "on_train_end",
    ]  # fmt: skip
    assert list(ports.kept) == [2]


def test_early_stopping_of_transformers_works_as_it_is(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    from transformers import EarlyStoppingCallback

    # At this rate it learns and then breaks what it learned; our own patience would wait longer.
    spec = make_spec(
        epochs=40, learning_rate=0.3, lr_scheduler="constant", max_grad_norm=100.0,
        early_stopping={"patience": 30},
    )  # fmt: skip
    trained = train(spec, data, ports, callbacks=[EarlyStoppingCallback(2)])

    assert (trained.report.stopped_early or "").startswith("a callback asked (EarlyStoppingCallba")
    assert trained.report.steps == (trained.report.best_step or 0) + 2 * 3


def test_an_epoch_that_a_callback_ends_is_left_and_a_resumed_run_knows_it(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    wishes = {("on_step_end", 1): "should_epoch_stop"}
    whole = train(make_spec(epochs=3), data, make_ports("whole"), callbacks=[recorder(wishes)])
    assert whole.report.steps == 1 + 3 + 3

    ports = make_ports("stopped", {5: StopReason.drain})
    with pytest.raises(Stopped):
        train(make_spec(epochs=3), data, ports, callbacks=[recorder(wishes)])
    again = recorder(wishes)
    resumed = train(
        make_spec(epochs=3), data, make_ports("on"), resume=ports.kept[5], callbacks=[again]
    )

    assert weights(resumed) == weights(whole)
    assert [event[:2] for event in again.seen[:4]] == [
        ("on_init_end", 0), ("on_train_begin", 5), ("on_epoch_begin", 5), ("on_step_begin", 5),
    ]  # fmt: skip
    assert [line["step"] for line in again.state.log_history if "loss" in line] == list(range(1, 8))


def test_saves_evaluations_and_logs_come_when_a_callback_wants_them(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    wishes = {
        ("on_step_end", 1): "should_save", ("on_step_end", 2): "should_evaluate",
        ("on_step_end", 4): "should_log",
    }  # fmt: skip
    seen = recorder(wishes)
    folders: list[Path] = []

    class Folders(type(seen)):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            assert (folders[-1] / "adapter.safetensors").is_file()

    train(make_spec(logging={"steps": 3}), data, ports, callbacks=[seen, Folders()])

    assert sorted(ports.kept) == [1, 2, 3, 6]
    assert [name.name for name in folders] == [f"checkpoint-{step}" for step in (1, 2, 3, 6)]
    told = [event for event in seen.seen if event[0] == "on_log"]
    assert [event[1] for event in told if "loss" in event] == [3, 4, 6]
    assert [event[1] for event in told if "eval_loss" in event] == [0, 2, 3, 6]


def test_a_callback_that_raises_fails_its_own_job_only(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts, prepared_folder: Path
) -> None:
    from transformers import TrainerCallback

    from llamahome.training.callbacks import watch_with
    from support.engines import Bench, file_bytes

    class Broken(TrainerCallback):
        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            raise BrokenPipeError("no wandb")

    with pytest.raises(TrainingFailed, match=r"Broken\.on_step_end raised BrokenPipeError") as it:
        train(make_spec(), data, make_ports("a"), callbacks=[Broken])
    assert it.value.code == "callback_failed"

    bench = Bench(make_spec, make_ports, data, "fp32")
    alone = bench.run({"other": {}})["other"]
    engine = bench.engine()
    ended: dict[str, Any] = {}
    bench.admit(engine, "other", ended)
    bench.admit(engine, "broken", ended, watch=watch_with([Broken]))
    engine.run()
    engine.close()
    assert isinstance(ended["broken"], TrainingFailed)
    assert file_bytes(ended["other"]) == file_bytes(alone)


def test_integrations_find_what_they_read(make_spec: MakeSpec, data: TokenData, ports: Any) -> None:
    """What transformers' own TensorBoard, W&B and MLflow callbacks take from their arguments."""
    from transformers import TrainerCallback
    from transformers.integrations.integration_utils import TensorBoardCallback, rewrite_logs

    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []
            self.texts: dict[str, str] = {}

        def add_text(self, name: str, text: str, *_: Any) -> None:
            self.texts[name] = text

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    class WandbLike(TrainerCallback):
        config: dict[str, Any]
        logged: list[dict[str, Any]]

        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            assert state.is_world_process_zero
            model = kw["model"]
            self.config = {**model.config.to_dict(), **args.to_dict()}
            self.config["model/num_parameters"] = model.num_parameters()
            self.logged = []

        def on_log(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            self.logged.append({**rewrite_logs(kw["logs"]), "train/global_step": state.global_step})

    wandb = WandbLike()
    writer = Writer()
    callbacks: list[Any] = [wandb]
    try:
        callbacks.append(TensorBoardCallback(tb_writer=writer))
    except RuntimeError:
        # tensorboard is not installed: the callback's own methods, without its constructor's check
        board = TensorBoardCallback.__new__(TensorBoardCallback)
        board.tb_writer, board.logging_dir, board._SummaryWriter = writer, None, None
        callbacks.append(board)
    trained = train(make_spec(), data, ports, callbacks=callbacks)

    assert wandb.config["learning_rate"] == 1e-2
    assert wandb.config["model/num_parameters"] > 1000
    assert "train/grad_norm" in wandb.logged[1]
    assert json.loads(writer.texts["args"])["num_train_epochs"] == 2
    names = {name for name, _, _ in writer.scalars}
    assert {"train/loss", "train/learning_rate", "eval/loss", "train/train_runtime"} <= names
    last = [value for name, value, _ in writer.scalars if name == "eval/loss"][-1]
    assert last == trained.report.metrics.eval_loss
    assert not any(name.startswith("events.out") for name in os.listdir(ports.scratch))
