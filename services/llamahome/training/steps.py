"""One optimizer step: an accumulation window of micro-batches, clipped, and AdamW."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from llamahome.config import TrainingConfig
from llamahome.conversations.tokens import TokenRows
from llamahome.training.data import labelled_counts, make_batch
from llamahome.training.evaluate import summed_loss
from llamahome.training.model import Adapter
from llamahome.training.runtime import Machine, seed_for
from llamahome.training.schedule import Plan, learning_rate


@dataclasses.dataclass(frozen=True)
class StepTaken:
    """What a step did. ``loss`` is its mean per labelled token, ``grad_norm`` before clipping."""

    samples: list[int]
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    labelled: int

    @property
    def finite(self) -> bool:
        """False where the step was skipped: neither weights nor moments have changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Stepper:
    """Takes steps by their number; all that it remembers is AdamW's state."""

    def __init__(
        self,
        adapter: Adapter,
        rows: TokenRows,
        plan: Plan,
        config: TrainingConfig,
        machine: Machine,
    ) -> None:
        self._adapter, self._rows, self._plan = adapter, rows, plan
        self._config, self._machine = config, machine
        self._labelled = labelled_counts(rows)
        self._parameters = list(adapter.parameters.values())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def take(self, step: int, on_batch: Callable[[], None]) -> StepTaken:
        """Step number ``step``, from 0; ``on_batch`` is called after each micro-batch."""
        windows = self._plan.micro_batches(step)
        samples = [int(sample) for window in windows for sample in window]
        labelled = int(self._labelled[samples].sum())
        loss, tokens = 0.0, 0
        self._adapter.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        for index, window in enumerate(windows):
            batch = make_batch(self._rows, window)
            tokens += batch.tokens
            if batch.labelled:
                seed_for(self._config.seed, step, index)
                # Divided by the labels of the whole window, not by each batch's: however the rows
                # are cut into micro-batches, every labelled token weighs the same.
                part = summed_loss(self._adapter.model, batch, self._machine) / labelled
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
            on_batch()
        rate = learning_rate(step, self._plan.total_steps, self._config)
        return StepTaken(samples, loss, self._update(loss, rate), rate, tokens, labelled)

    def _update(self, loss: float, rate: float) -> float:
        """Clip, and step where loss and gradient are finite. Returns the norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's moments and step counts on the CPU, as ``<what>/<parameter>``."""
        return {
            f"{what}/{name}": value.detach().to("cpu", copy=True).contiguous()
            for name, parameter in self._adapter.parameters.items()
            for what, value in self._optimizer.state.get(parameter, {}).items()
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of :meth:`tensors`; moments go to their parameter's device."""
        for key, value in tensors.items():
            what, _, name = key.partition("/")
            parameter = self._adapter.parameters[name]
            # The step count stays on the CPU, where AdamW keeps it unless it is fused.
            device = torch.device("cpu") if what == "step" else parameter.device
            self._optimizer.state[parameter][what] = value.to(device, copy=True)
