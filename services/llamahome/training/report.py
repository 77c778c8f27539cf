"""What a run says while it runs: progress, events, and the history kept with the model."""

from __future__ import annotations

import math

from llamahome.config import TrainingConfig
from llamahome.schemas import JsonObject
from llamahome.training.checkpoints import TrainState
from llamahome.training.gauges import Gauges
from llamahome.training.ports import TrainPorts
from llamahome.training.schedule import Plan
from llamahome.training.steps import StepTaken

# Beside a number that had to become null: a step that was skipped, an evaluation without a result.
_NOT_FINITE: JsonObject = {"not_finite": True}


class Reporter:
    """Turns what happened into progress, events and history lines.

    What the clock and the machine decide (see gauges.py) goes to those who look on, never into the
    history.
    """

    def __init__(
        self, ports: TrainPorts, plan: Plan, config: TrainingConfig, gauges: Gauges
    ) -> None:
        self._gauges = gauges
        self._ports = ports
        self._plan = plan
        self._logging_steps = config.logging.steps
        self._step = 0
        self._newest: JsonObject = {}

    def started(self, state: TrainState, config: TrainingConfig) -> None:
        if state.step == 0:
            self._ports.event("Fine-tuning job started")
        else:
            self._ports.event(f"Fine-tuning job resumed from step {state.step}")
        total = self._plan.total_steps
        if state.step == 0 and config.warmup_steps >= total:
            self._ports.event(
                f"warmup_steps is {config.warmup_steps}, and there are {total} steps: the learning "
                f"rate does not get past warm-up",
                level="warn",
            )
        self._step = state.step
        self.beat()

    def beat(self) -> None:
        """Say again where the run stands, so that a watcher knows it is alive."""
        self._ports.progress(self._step, self._plan.total_steps, self._newest)

    def stepped(self, state: TrainState, taken: StepTaken, seconds: float) -> None:
        """After each step, which took so many ``seconds``."""
        epoch = self._plan.epoch_of(state.place)
        measured = self._gauges.read(taken.tokens, seconds)
        figures: JsonObject = {
            "epoch": epoch,
            "train_loss": state.train_loss,
            "learning_rate": state.learning_rate,
            "grad_norm": finite(taken.grad_norm),
        }
        self._step = state.step
        said = {**figures, "loss": state.train_loss, **measured}
        self._newest = {**self._newest, **said}
        self.beat()
        total = self._plan.total_steps
        if taken.finite and state.step % self._logging_steps and state.step != total:
            return
        line = {"step": state.step, **figures, "labelled_tokens": taken.labelled}
        if not taken.finite:
            line |= _NOT_FINITE
        state.history.append(line)
        loss = "not finite, skipped" if state.train_loss is None else f"{state.train_loss:.4f}"
        self._ports.event(
            f"Step {state.step}/{total}: training loss {loss}",
            data={**line, "total_steps": total, **measured},
        )

    def evaluated(self, state: TrainState, loss: float) -> None:
        epoch = self._plan.epoch_of(state.place)
        flag = {} if math.isfinite(loss) else _NOT_FINITE
        state.history.append(
            {"step": state.step, "epoch": epoch, "eval_loss": finite(loss), **flag}
        )
        self._newest = {**self._newest, "eval_loss": finite(loss)}
        if state.step == 0:
            when = "before training"
        elif state.place % self._plan.steps_per_epoch == 0:
            when = f"after epoch {epoch}"
        else:
            when = f"after step {state.step}"
        self._ports.event(
            f"Evaluation {when}: {loss:.4f}",
            data={
                "step": state.step,
                "total_steps": self._plan.total_steps,
                "epoch": epoch,
                "eval_loss": finite(loss),
                **flag,
            },
        )
        self.beat()

    def skipped(self, state: TrainState) -> None:
        self._ports.event(
            f"Step {state.step} skipped: its loss or gradient is not finite "
            f"({state.skipped_in_a_row} in a row)",
            level="warn",
        )

    def say(self, message: str, *, level: str = "info") -> None:
        self._ports.event(message, level=level)


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None
