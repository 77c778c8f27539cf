"""How much memory a pass takes, how many layers to recompute so that it fits, and what a lack of it
looks like."""

from __future__ import annotations

import dataclasses
from typing import Any

import psutil
import torch

from llamahome.errors import TrainingFailed

_LOGIT_BYTES = 3 * 64 * 1024 * 1024  # the head's working set (losses.py)
_TELLING_TOKENS = 512  # a smaller pass says little of what a token takes
_SHARE = 0.9  # of what is free; the rest is left to fragments and estimates that are off


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a base decides the memory that its activations take; widths in elements."""

    layers: int
    hidden: int
    intermediate: int
    element_bytes: int

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> Shape:
        config = model.config.get_text_config()
        hidden = int(
            getattr(config, "hidden_size", 0) or model.get_input_embeddings().weight.shape[1]
        )
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
        layers = getattr(config, "num_hidden_layers", None) or 1
        return cls(int(layers), hidden, int(intermediate), dtype.itemsize)

    @property
    def layer_bytes(self) -> int:
        """Kept for the backward pass by one layer for one token.

        6 hidden + 3 intermediate: 4.3 MB a token for an 8B Llama in bf16, 1.2 MB for a 1B one,
        within 4 % of what was measured (4.46 and 1.21).
        """
        return self.element_bytes * (6 * self.hidden + 3 * self.intermediate)


class MemoryModel:
    """Estimates a pass and says how to make it fit.

    ``limit`` is the bytes that activations may take; None asks the device what is free. A limit set
    by hand is kept to as if it were the device's: a pass beyond it raises torch.OutOfMemoryError.
    """

    def __init__(self, shape: Shape, device: torch.device, limit: int | None = None) -> None:
        self.shape, self.device, self.limit = shape, device, limit
        self._factor = 1.0

    def needs(self, tokens: int, recomputed: int) -> int:
        """Bytes for a learning pass with the first ``recomputed`` layers recomputed."""
        layer, kept = self.shape.layer_bytes, self.shape.element_bytes * self.shape.hidden
        whole = (self.shape.layers - recomputed) * layer + recomputed * kept
        estimate = tokens * (whole + (layer if recomputed else 0))
        return int(self._factor * estimate) + self._head_bytes()

    def observe(self, tokens: int, recomputed: int, used: int) -> None:
        """Learn from a pass that took ``used`` bytes: where estimates are low, they are raised."""
        estimate = (self.needs(tokens, recomputed) - self._head_bytes()) / self._factor
        if tokens >= _TELLING_TOKENS and used > self._head_bytes():
            self._factor = max(self._factor, (used - self._head_bytes()) / estimate)

    def _head_bytes(self) -> int:
        return 0 if self.limit is not None else _LOGIT_BYTES

    def room(self) -> int:
        if self.limit is not None:
            return self.limit
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(
                self.device
            )
            return int(_SHARE * (free + unused))
        return int(_SHARE * psutil.virtual_memory().available)

    def layers_to_recompute(self, tokens: int, most: int) -> int:
        """The fewest that make a learning pass of so many tokens fit; ``most`` where none does."""
        room = self.room()
        for layers in range(most + 1):
            if self.needs(tokens, layers) <= room:
                return layers
        return most

    def enforce(self, tokens: int, recomputed: int) -> None:
        """Raise torch.OutOfMemoryError where a limit set by hand would be passed."""
        needed = self.needs(tokens, recomputed)
        if self.limit is not None and needed > self.limit:
            raise torch.OutOfMemoryError(
                f"a pass of {tokens} tokens takes {needed} bytes, and the limit is {self.limit}"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking: a device's, or the host's, of which torch tells without a type of
    its own, and Python and numpy with another."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def failure_of(error: Exception) -> Exception:
    """What a job is told: of a lack of memory as TrainingFailed (``out_of_memory``), of anything
    else as it was raised."""
    if not is_out_of_memory(error):
        return error
    first = next(iter(str(error).splitlines()), type(error).__name__)
    failed = TrainingFailed(
        f"out of memory: {first}", code="out_of_memory",
        remedy="Lower batch_size (and raise gradient_accumulation_steps) or max_length",
    )  # fmt: skip
    failed.__cause__ = error
    return failed
