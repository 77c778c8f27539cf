"""Trading time for memory: layers whose activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


class Recomputation:
    """Layers of the base that can be recomputed, the first ``layers`` of which are.

    Dropout needs no care here: it is a function of counters (draws.py).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = 0
        self._stack = _decoder_layers(model)
        for index, layer in enumerate(self._stack):
            layer.forward = partial(self._forward, index, layer.forward)

    @property
    def most(self) -> int:
        """How many layers there are."""
        return len(self._stack)

    def close(self) -> None:
        for layer in self._stack:
            del layer.forward

    def _forward(self, index: int, forward: Callable[..., Any], *values: Any, **named: Any) -> Any:
        if index >= self.layers or not torch.is_grad_enabled():
            return forward(*values, **named)
        return checkpoint(
            partial(forward, **named), *values, use_reentrant=False, preserve_rng_state=False
        )


def _decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The longest list of modules of one class: the stack of layers, by every name it goes by."""
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(one) for one in module}) == 1
    ]
    return max(stacks, key=len, default=[])
