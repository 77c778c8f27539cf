"""Rich bars for a training, as a transformers callback."""

from __future__ import annotations

from typing import Any, Self

from rich.progress import TaskID
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

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
        self._steps = self._size = 1  # of an epoch, in steps and in batches
        self._total = 1  # steps of the current epoch
        self._number = 0  # of the current epoch, from 0
        self._first = 0  # step of the current epoch
        self._is_placed = False
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
        self._epoch = self.progress.add_task("Epoch", total=1)
        self._loss = None
        self._steps, self._size = _epoch_size(args, state, kwargs.get("train_dataloader"))
        self._number = state.global_step // self._steps
        self._place_epoch(state, self._number * self._steps)
        self._is_placed = True
        self._show(args, state)
        self.progress.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._epoch is None:
            return
        if not self._is_placed:
            self._number += 1
            self._place_epoch(state, state.global_step)  # the one before may have been cut short
        self._is_placed = False
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

    def _place_epoch(self, state: Any, first: int) -> None:
        """A fresh bar for the current epoch, the last of which may be a short one."""
        assert self._epoch is not None
        self._first, self._batches = first, 0
        self._total = max(min(self._steps, state.max_steps - first), 1)
        self.progress.reset(self._epoch, total=self._total)

    def _show(self, args: Any, state: Any) -> None:
        if self._overall is None or self._epoch is None:
            return
        step, within = state.global_step, state.global_step - self._first
        # Without a length of the data, transformers says sys.maxsize.
        epochs = max(min(int(state.num_train_epochs), -(-state.max_steps // self._steps)), 1)
        epoch = min(self._number + 1, epochs)
        batches = min(within * args.gradient_accumulation_steps + self._batches, self._size)
        loss = "" if self._loss is None else f", loss {self._loss:.4f}"
        self.progress.update(
            self._overall, completed=step,
            description=f"Training: step {step}/{state.max_steps} of {epochs} epochs{loss}",
        )  # fmt: skip
        self.progress.update(
            self._epoch, completed=within,
            description=f"Epoch {epoch}/{epochs}: step {within}/{self._total}, batch {batches}",
        )  # fmt: skip


def _epoch_size(args: Any, state: Any, loader: Any) -> tuple[int, int]:
    """Optimizer steps, as the Trainer counts them, and batches.

    ``loader`` is None where only the state tells of the run: its epochs are then of one length.
    Where the data have no length, all there is to do is one epoch.
    """
    together = args.gradient_accumulation_steps
    if loader is not None and has_length(loader):
        batches = max(len(loader), 1)
        return -(-batches // together), batches
    epochs = int(state.num_train_epochs) if loader is None else 1
    steps = max(-(-state.max_steps // max(epochs, 1)), 1)
    return steps, steps * together
