"""transformers' TrainerCallbacks watch a run as they would watch a Trainer's.

Each event comes in the Trainer's order (transformers 5, ``Trainer._inner_training_loop``), with
TrainingArguments, TrainerState and TrainerControl, so the callbacks of W&B, MLflow, TensorBoard and
the like work unchanged. What differs from a Trainer:

- ``model`` is the frozen base, without the adapter; ``optimizer`` holds the adapter's weights as
  one flat parameter, with its gradient; ``processing_class`` is None, the dataloaders have a length
  only.
- The micro-batches of a step are computed together: ``on_substep_end`` comes after all of them.
- A step whose loss or gradient is not finite is skipped, without the two optimizer events.
- Validation rows are always evaluated before training (``eval_on_start``), and where a callback
  stops the run; never twice after one step.
- A checkpoint is saved with every evaluation, and at most one a step, after its evaluation.
- ``total_flos`` counts what gauges.py says; ``num_input_tokens_seen`` is always counted.
- States of callbacks are not saved; a resumed run begins with the checkpoint's numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from llamahome.errors import TrainingFailed
from llamahome.training.callback_views import (
    Batches,
    Rates,
    epoch_at,
    new_state,
    speeds,
    training_arguments,
)
from llamahome.training.checkpoints import TrainState
from llamahome.training.schedule import Due
from llamahome.training.steps import StepTaken

if TYPE_CHECKING:
    from llamahome.training.engine.job import TrainingJob

Callback = TrainerCallback | type[TrainerCallback]


def watch_with(callbacks: Sequence[Callback]) -> Callable[[TrainingJob], CallbackWatcher]:
    """For :meth:`Engine.admit`; classes are instantiated without arguments, as the Trainer does."""
    return lambda job: CallbackWatcher(job, callbacks)


class CallbackWatcher:
    """One run's callbacks and what they see. A :class:`~llamahome.training.watching.Watcher`.

    A callback that raises ends the run with TrainingFailed, code ``callback_failed``.
    """

    wants_saves_done = True

    def __init__(self, job: TrainingJob, callbacks: Sequence[Callback]) -> None:
        self._job = job
        self._callbacks = [each() if isinstance(each, type) else each for each in callbacks]
        self._folder = job.ports.scratch / "callbacks"
        self.args: Any = training_arguments(job, self._folder)
        self.state: Any = TrainerState()
        self.control: Any = TrainerControl()
        self._rates = Rates(job.config.learning_rate)
        plan, rows = job.plan, job.data.validation
        self._batches = (
            Batches(plan.batches_per_epoch), Batches(math.ceil(len(rows) / plan.batch_size)),
        )  # fmt: skip
        self._in_epoch = False
        self._stopper: str | None = None
        self._losses: list[float] = []  # since the last log
        self._summed = 0.0
        self._logged_at = self._first_step = 0
        self._began = time.monotonic()

    @property
    def stop(self) -> str | None:
        if not self.control.should_training_stop or self._stopper is None:
            return None
        return f"a callback asked ({self._stopper}), at step {self.state.global_step}"

    @property
    def leaves_epoch(self) -> bool:
        return bool(self.control.should_epoch_stop)

    def train_begin(self, state: TrainState) -> None:
        self._tell("on_init_end")
        self.state = new_state(self._job, state, self._folder)
        self._logged_at = self._first_step = state.step
        self._began = time.monotonic()
        self.control.should_training_stop = False
        self._tell("on_train_begin")

    def step_begin(self, state: TrainState) -> None:
        if not self._in_epoch:
            self._in_epoch = True
            self.control.should_epoch_stop = False
            self._tell("on_epoch_begin")
        self.control.should_log = False
        self.control.should_evaluate = False
        self.control.should_save = False
        self._tell("on_step_begin")

    def micro_batch_end(self) -> None:
        self._tell("on_substep_end")

    def before_optimizer(self) -> None:
        self._tell("on_pre_optimizer_step")

    def after_optimizer(self) -> None:
        self._tell("on_optimizer_step")

    def step_end(self, state: TrainState, taken: StepTaken, due: Due) -> Due:
        self._rates.newest = taken.learning_rate
        if math.isfinite(taken.loss):
            self._losses.append(taken.loss)
        shown = self.state
        shown.global_step, shown.epoch = state.step, epoch_at(self._job.plan, state.place)
        shown.num_input_tokens_seen = state.seen_tokens
        shown.total_flos = self._job.gauges.flops_per_token * state.seen_tokens
        self.control.should_log |= state.step % shown.logging_steps == 0
        if state.place == self._job.plan.total_steps:
            self.control.should_training_stop = True
        return self._ask("on_step_end", taken, due)

    def epoch_end(self, state: TrainState, due: Due) -> Due:
        self._in_epoch = False
        return self._ask("on_epoch_end", None, due)

    def _ask(self, event: str, taken: StepTaken | None, due: Due) -> Due:
        """Tell of what is due, in the control's flags, and log. What is then still wanted."""
        self.control.should_evaluate |= due.evaluate
        self.control.should_save |= due.save
        self._tell(event)
        if self.control.should_log and self.state.global_step > self._logged_at:
            self._log_training(taken)
        wanted = Due(bool(self.control.should_evaluate), bool(self.control.should_save))
        self.control.should_evaluate = self.control.should_save = False
        return wanted

    def evaluation_batch(self) -> None:
        self._tell("on_prediction_step")

    def evaluated(self, state: TrainState, loss: float, seconds: float) -> None:
        rows, batches = len(self._job.data.validation), len(self._batches[1])
        metrics = {"eval_loss": loss, **speeds("eval", seconds, rows, batches)}
        self._log(metrics)
        self.control.should_evaluate = False
        self._tell("on_evaluate", metrics=metrics)
        if state.stopping.best_step == state.step and state.step:
            self.state.best_metric, self.state.best_global_step = loss, state.step
            self.state.best_model_checkpoint = str(self._folder / f"checkpoint-{state.step}")

    def saved(self, state: TrainState) -> None:
        self._link(state.step)
        self.control.should_save = False
        self._tell("on_save")

    def train_end(self, state: TrainState) -> None:
        self._summed += sum(self._losses)
        steps, plan = state.step - self._first_step, self._job.plan
        rows = plan.rows * plan.epochs * steps / plan.total_steps
        self._log(
            {
                **speeds("train", time.monotonic() - self._began, rows, steps),
                "total_flos": self.state.total_flos,
                "train_loss": self._summed / max(steps, 1),
            }
        )
        self._tell("on_train_end")

    def _log_training(self, taken: StepTaken | None) -> None:
        """The mean loss since the last log; with the newest step's norm, where it is at hand."""
        logs = {"loss": sum(self._losses) / len(self._losses) if self._losses else math.nan}
        if taken is not None:
            logs["grad_norm"] = taken.grad_norm
        self._summed += sum(self._losses)
        self._losses, self._logged_at = [], self.state.global_step
        self._log(logs | {"learning_rate": self._rates.newest})

    def _log(self, logs: dict[str, float]) -> None:
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control.should_log = False
        self._tell("on_log", logs=logs)

    def _link(self, step: int) -> None:
        """Callbacks look for ``output_dir/checkpoint-<step>``; those that are gone are unlinked."""
        self._folder.mkdir(exist_ok=True)
        for old in self._folder.glob("checkpoint-*"):
            if old.is_symlink() and not old.exists():
                old.unlink()
        link = self._folder / f"checkpoint-{step}"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / "checkpoints" / f"checkpoint-{step:08d}")

    def _tell(self, event: str, **more: Any) -> None:
        train, held = self._batches
        for callback in self._callbacks:
            asked = self.control.should_training_stop
            try:
                given = getattr(callback, event)(
                    self.args, self.state, self.control, model=self._job.warm.model,
                    processing_class=None, optimizer=self._job.optimizer.adamw,
                    lr_scheduler=self._rates, train_dataloader=train, eval_dataloader=held, **more,
                )  # fmt: skip
            except Exception as error:
                raise _failed(callback, event, error) from error
            if given is not None:
                self.control = given
            if self.control.should_training_stop and not asked:
                self._stopper = type(callback).__name__


def _failed(callback: object, event: str, error: Exception) -> TrainingFailed:
    return TrainingFailed(
        f"{type(callback).__name__}.{event} raised {type(error).__name__}: {error}",
        code="callback_failed", remedy="Mend the callback or leave it out",
    )  # fmt: skip
