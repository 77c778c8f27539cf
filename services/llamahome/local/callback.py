"""Rich bars for a training, as a transformers callback."""

from __future__ import annotations

from typing import Any, Self

from rich.progress import TaskID
from transformers import TrainerCallback

from llamahome.local.bars import new_progress


class ProgressCallback(TrainerCallback):
    """Custom callback for training progress: all steps, and those of the current epoch.

    For a transformers Trainer (``callbacks=[ProgressCallback()]``) and for
    :func:`llamahome.local.train_files` alike; ``TrainingData.train_model`` uses it, too. Nothing is
    drawn off a terminal, or by any process but the main one. A Trainer does not tell of an
    exception: use it in a ``with`` block, or call :meth:`close`, where one must not leave bars.
    """

    def __init__(self) -> None:
        self.progress = new_progress()
        self._overall: TaskID | None = None
        self._epoch: TaskID | None = None
        self._batches = 0  # of the current step
        self._first = 0  # step of the current epoch
        self._loss: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing; the bars stay where they are. Harmless to repeat."""
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self._overall = self.progress.add_task(
            "Training", total=state.max_steps, completed=state.global_step
        )
        self._epoch = self.progress.add_task("Epoch", total=_per_epoch(state))
        self._loss = None
        self._place_epoch(state)
        self._show(args, state)
        self.progress.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._epoch is None:
            return
        self._place_epoch(state)
        self._show(args, state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1
        self._show(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches = 0
        self._show(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = logs["loss"]
            self._show(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(args, state)
        self.close()

    def _place_epoch(self, state: Any) -> None:
        """A fresh bar for the current epoch, the last of which may be a short one."""
        assert self._epoch is not None
        steps = _per_epoch(state)
        self._first, self._batches = state.global_step // steps * steps, 0
        total = max(min(steps, state.max_steps - self._first), 1)
        self.progress.reset(self._epoch, total=total)

    def _show(self, args: Any, state: Any) -> None:
        if self._overall is None or self._epoch is None:
            return
        step, steps = state.global_step, _per_epoch(state)
        epochs = max(int(state.num_train_epochs), 1)
        epoch = min(self._first // steps + 1, epochs)
        within = step - self._first
        batches = within * args.gradient_accumulation_steps + self._batches
        loss = "" if self._loss is None else f", loss {self._loss:.4f}"
        self.progress.update(
            self._overall, completed=step,
            description=f"Training: step {step}/{state.max_steps} of {epochs} epochs{loss}",
        )  # fmt: skip
        self.progress.update(
            self._epoch, completed=within,
            description=f"Epoch {epoch}/{epochs}: step {within}/{steps}, batch {batches}",
        )  # fmt: skip


def _per_epoch(state: Any) -> int:
    """Optimizer steps of an epoch, rounded up."""
    epochs = max(int(state.num_train_epochs), 1)
    return max(-(-int(state.max_steps) // epochs), 1)
