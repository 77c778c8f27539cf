"""A run as transformers' callbacks see it: its arguments, its state, and stand-ins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState, TrainingArguments

from llamahome.schemas import JsonObject
from llamahome.training.checkpoints import TrainState
from llamahome.training.schedule import Plan

if TYPE_CHECKING:
    from llamahome.training.engine.job import TrainingJob

_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclasses.dataclass(frozen=True)
class Batches:
    """All of a dataloader that is shown: how many batches it has."""

    count: int

    def __len__(self) -> int:
        return self.count


@dataclasses.dataclass
class Rates:
    """All of a learning-rate scheduler that is shown."""

    newest: float

    def get_last_lr(self) -> list[float]:
        return [self.newest]


def training_arguments(job: TrainingJob, folder: Path) -> Any:
    """The job's settings by transformers' names; ``folder`` is the output folder."""
    config, validated = job.config, len(job.data.validation) > 0
    by_steps = config.eval_steps is not None
    arguments: Any = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULERS[config.lr_scheduler],
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=job.machine.precision == "bf16",
        use_cpu=job.machine.device.type == "cpu",
        eval_strategy=("steps" if by_steps else "epoch") if validated else "no",
        eval_steps=config.eval_steps,
        eval_on_start=validated,
        save_strategy=config.checkpointing.save_strategy,
        save_steps=config.checkpointing.save_steps,
        save_total_limit=config.checkpointing.save_total_limit,
        logging_steps=config.logging.steps,
        metric_for_best_model="eval_loss" if validated else None,
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
    )
    # Set here, for the constructor would insist on saves at the same moments as evaluations; ours
    # are, whatever the save strategy.
    arguments.load_best_model_at_end = validated and config.early_stopping.enabled
    return arguments


def new_state(job: TrainingJob, state: TrainState, folder: Path) -> Any:
    """Where the run stands at its start, or at the checkpoint that it goes on from."""
    plan, config, stopping = job.plan, job.config, state.stopping
    best = stopping.best_step
    return TrainerState(
        epoch=epoch_at(plan, state.place),
        global_step=state.step,
        max_steps=plan.total_steps,
        num_train_epochs=config.epochs,
        train_batch_size=config.batch_size,
        logging_steps=config.logging.steps,
        eval_steps=config.eval_steps or plan.steps_per_epoch,
        save_steps=config.checkpointing.save_steps
        if config.checkpointing.save_strategy == "steps"
        else plan.steps_per_epoch,
        num_input_tokens_seen=state.seen_tokens,
        total_flos=job.gauges.flops_per_token * state.seen_tokens,
        log_history=[_logged(line, plan, state) for line in state.history],
        best_metric=stopping.best_loss,
        best_global_step=best,
        best_model_checkpoint=None if best is None else str(folder / f"checkpoint-{best}"),
    )


def epoch_at(plan: Plan, place: int) -> float:
    """Epochs done after ``place`` steps of the plan, with the share of the one at hand."""
    epochs, windows = divmod(place, plan.steps_per_epoch)
    return epochs + windows * plan.accumulation / plan.batches_per_epoch


def speeds(what: str, seconds: float, rows: float, steps: float) -> dict[str, float]:
    """As transformers' ``speed_metrics`` names and rounds them."""
    spent = max(seconds, 1e-9)
    return {
        f"{what}_runtime": round(seconds, 4),
        f"{what}_samples_per_second": round(rows / spent, 3),
        f"{what}_steps_per_second": round(steps / spent, 3),
    }


def _logged(line: JsonObject, plan: Plan, state: TrainState) -> dict[str, float]:
    """A line of the history as the Trainer would have logged it."""
    step = line["step"]
    # Where steps were left out, only the whole epoch of an old line is known.
    epoch = float(line["epoch"]) if state.left_out else epoch_at(plan, step)
    if "eval_loss" in line:
        return {"eval_loss": line["eval_loss"], "epoch": epoch, "step": step}
    return {
        "loss": line["train_loss"], "grad_norm": line["grad_norm"],
        "learning_rate": line["learning_rate"], "epoch": epoch, "step": step,
    }  # fmt: skip
