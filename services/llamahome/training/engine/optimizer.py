"""AdamW over one flat buffer, gated: a gradient that is not finite changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from llamahome.config import TrainingConfig
from llamahome.training.engine.slots import Slot
from llamahome.training.watching import NOBODY, Watcher

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


class SlotOptimizer:
    """torch's AdamW (Loshchilov and Hutter 2019) on a slot's weights, as one tensor.

    Its moments are made here and not, as torch does it, at the first step: where there is no room
    for them, the job has not begun.
    """

    def __init__(self, slot: Slot, config: TrainingConfig) -> None:
        self._slot, self._max_norm = slot, config.max_grad_norm
        self._adamw = torch.optim.AdamW(
            [slot.weights], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        # As torch begins: for its fused kernels the count of steps lies beside the weights.
        self._state = self._adamw.state[slot.weights]
        self._state[_STEP] = torch.zeros((), dtype=torch.float32, device=slot.weights.device)
        for what in _MOMENTS:
            self._state[what] = torch.zeros_like(slot.weights.data)

    @property
    def adamw(self) -> torch.optim.AdamW:
        """For watchers."""
        return self._adamw

    @torch.no_grad()
    def step(self, loss: float, rate: float, watcher: Watcher = NOBODY) -> float:
        """Clip and step, where loss and gradient are finite; then zero the gradient.

        ``watcher`` is told before and after a step that is taken.

        Returns the gradient's norm before clipping.
        """
        gradient = self._slot.gradient
        norm = float(torch.linalg.vector_norm(gradient))
        if math.isfinite(loss) and math.isfinite(norm):
            # As torch's clip_grad_norm_ does it.
            gradient.mul_(min(1.0, self._max_norm / (norm + 1e-6)))
            for group in self._adamw.param_groups:
                group["lr"] = rate
            watcher.before_optimizer()
            self._adamw.step()
            self._slot.refresh()
            watcher.after_optimizer()
        gradient.zero_()
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Moments and step count, copies on the CPU, as ``<what>/<parameter>``; {} at the start."""
        if not self._state[_STEP]:
            return {}
        named = {
            f"{what}/{name}": tensor
            for what in _MOMENTS
            for name, tensor in self._slot.named(self._state[what]).items()
        }
        return named | {_STEP: self._state[_STEP].to("cpu", copy=True)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        if not tensors:
            return
        self._state[_STEP].copy_(tensors[_STEP])
        for what in _MOMENTS:
            mine = {
                key.removeprefix(f"{what}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{what}/")
            }
            self._slot.load(mine, into=self._state[what])
