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
    """torch's AdamW (Loshchilov and Hutter 2019) on a slot's weights, as one tensor."""

    def __init__(self, slot: Slot, config: TrainingConfig) -> None:
        self._slot, self._max_norm = slot, config.max_grad_norm
        self._adamw = torch.optim.AdamW(
            [slot.weights], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

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
        state = self._adamw.state.get(self._slot.weights, {})
        if not state:
            return {}
        named = {
            f"{what}/{name}": tensor
            for what in _MOMENTS
            for name, tensor in self._slot.named(state[what]).items()
        }
        return named | {_STEP: state[_STEP].to("cpu", copy=True)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        if not tensors:
            return
        weights = self._slot.weights
        state: dict[str, torch.Tensor] = {_STEP: tensors[_STEP].to(weights.device, copy=True)}
        for what in _MOMENTS:
            state[what] = torch.zeros_like(weights.data)
            mine = {
                key.removeprefix(f"{what}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{what}/")
            }
            self._slot.load(mine, into=state[what])
        self._adamw.state[weights].update(state)
