"""What is asked of a base when it is loaded: may its rows go side by side, and jobs share a pass?

Each answer is None for yes, and the reason otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from llamahome.training.engine.losses import Head
from llamahome.training.engine.passes import Unit
from llamahome.training.engine.slots import Slot
from llamahome.training.model import LoadedBase

_LENGTHS = (5, 17, 9)
# Largest gap of a logit, as a share of the largest logit: through all layers, where attention is
# another, and through the head alone, where no more than one rounding is.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
_CLOSE_HEAD = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.01}

Row = NDArray[np.int32]


def probe_rows(loaded: LoadedBase) -> list[Row]:
    """A few short rows of random tokens."""
    context = loaded.context or max(_LENGTHS)
    draw = np.random.default_rng(0)
    return [
        draw.integers(0, loaded.vocabulary, min(length, context)).astype(np.int32)
        for length in _LENGTHS
    ]


def probe_units(rows: Sequence[Row], loaded: LoadedBase) -> list[Unit]:
    """The rows without an adapter, a label at each place."""
    bare = Slot.without_layers(loaded.device, loaded.dtype)
    return [
        Unit(bare, (row,), np.arange(len(row)), np.zeros(len(row), np.int64), 1.0, False)
        for row in rows
    ]


def own_logits(loaded: LoadedBase, row: Row) -> torch.Tensor:
    """By the base's own forward, [T, vocabulary]."""
    logits: torch.Tensor = loaded.model(input_ids=_ids(row, loaded), use_cache=False).logits
    return logits[0]


def unlike_head(
    loaded: LoadedBase, head: Head, rows: Sequence[Row], own: Sequence[torch.Tensor]
) -> str | None:
    """What the base does between its last layer and its logits must be the head and no more."""
    gaps = []
    for row, theirs in zip(rows, own, strict=True):
        decoder = loaded.model.get_decoder()
        hidden = decoder(input_ids=_ids(row, loaded), use_cache=False).last_hidden_state[0]
        gaps.append(_gap(functional.linear(hidden, head.weight, head.bias), theirs))
    scale = max(_largest(each) for each in own)
    if not max(gaps) <= _CLOSE_HEAD[loaded.dtype] * scale:
        return f"its logits are not the head's alone: they differ by {max(gaps):.3g} of {scale:.3g}"
    return None


def unlike_own(
    loaded: LoadedBase, ours: Sequence[torch.Tensor], own: Sequence[torch.Tensor]
) -> str | None:
    """Packed logits against those of each row by the base's own forward."""
    gap = max(_gap(a, b) for a, b in zip(ours, own, strict=True))
    scale = max(1.0, *(_largest(each) for each in own))
    if not gap <= _CLOSE[loaded.dtype] * scale:
        return f"packed logits differ from the base's own by {gap:.3g}"
    return None


def unlike_shorter(config: Any) -> str | None:
    """What in a base's config makes a packed row unlike the row alone, where a probe of a few short
    rows cannot see it."""
    text = config.get_text_config()
    # The longest row of a pass would choose the frequencies of all its rows.
    if "longrope" in json.dumps(getattr(text, "rope_parameters", None), default=str):
        return "its rotary frequencies depend on the longest row of a pass (longrope)"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            return f"its logits are not the head's alone ({name})"
    return None


def unlike_in_bits(
    loaded: LoadedBase, together: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]
) -> str | None:
    """Where equality in bits is promised, in fp32 on a CPU: does a row's result depend on what else
    is in its pass?

    Experts get the tokens of a whole pass that are routed to them, in products of as many rows:
    a row's last bits follow that number, if not in these few rows, then in others.
    """
    if loaded.device.type != "cpu" or loaded.dtype is not torch.float32:
        return None
    kinds = {type(module).__name__.lower() for module in loaded.model.modules()}
    if any("expert" in kind or "moe" in kind for kind in kinds):
        return "its experts multiply the tokens of a whole pass, and the sums follow their number"
    if any(not torch.equal(one, other) for one, other in zip(together, alone, strict=True)):
        return "the last bits of a row's result follow what else is in its pass"
    return None


def _ids(row: Row, loaded: LoadedBase) -> torch.Tensor:
    return torch.from_numpy(row)[None].long().to(loaded.device)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.cpu() - other.cpu()).abs().max())


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())
