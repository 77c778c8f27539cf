"""What a job proves about itself on its own data and base; the results go into its report."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch

from llamahome.conversations.tokens import TokenRows
from llamahome.schemas import JsonObject
from llamahome.training.data import labelled_counts
from llamahome.training.engine.passes import Unit, make_unit
from llamahome.training.engine.slots import Slot
from llamahome.training.engine.warm import UnitLoss, WarmBase

# What is checked does not depend on how long the rows are, and what it costs does: with whole rows
# the checks of a job of 12 short steps took as long as eight of its steps.
_ROWS = 2
_ROW_TOKENS = 32
_LOOKED_AT = 256


def check_factoring(
    slot: Slot, rows: TokenRows
) -> Generator[list[Unit], Sequence[UnitLoss], JsonObject]:
    """The same rows as one micro-batch and as one each: loss and gradient must not depend on it.

    ``loss_gap`` and ``gradient_gap`` are relative to the first; without dropout. The slot's
    gradient must be zero, and is again afterwards. The passes are the engine's own, which makes
    them smaller where memory is short.
    """
    samples = some_rows(rows)
    labelled = int(labelled_counts(rows)[samples].sum())
    found = []
    for parts in ([samples], [[sample] for sample in samples]):
        units = [
            make_unit(slot, rows, part, weight=1 / labelled, learns=True, most_tokens=_ROW_TOKENS)
            for part in parts
        ]
        loss = sum(each.weighted for each in (yield units))
        found.append((loss, slot.gradient.to("cpu", copy=True)))
        slot.gradient.zero_()
    (loss, gradient), (other_loss, other_gradient) = found
    norm = float(torch.linalg.vector_norm(gradient))
    apart = float(torch.linalg.vector_norm(gradient - other_gradient))
    return {
        "rows": len(samples),
        "loss_gap": _finite(abs(loss - other_loss) / max(abs(loss), 1e-12)),
        "gradient_gap": _finite(apart / max(norm, 1e-12)),
    }


def check_isolation(warm: WarmBase, slot: Slot, rows: TokenRows) -> JsonObject:
    """The isolation canary: rows packed into one pass against each alone, with the adapter on.

    ``max_logit_gap`` is the largest difference of any logit at a labelled place; 0 on a CPU.
    """
    samples = some_rows(rows)
    units = [
        make_unit(slot, rows, [sample], weight=1.0, learns=False, most_tokens=_ROW_TOKENS)
        for sample in samples
    ]
    together = warm.logits(units)
    alone = [warm.logits([unit])[0] for unit in units]
    gap = max(
        float((one.double() - other.double()).abs().max())
        for one, other in zip(together, alone, strict=True)
    )
    return {"rows": len(samples), "packed": warm.shares_passes, "max_logit_gap": _finite(gap)}


def some_rows(rows: TokenRows) -> list[int]:
    """Among the first rows with a label, those that are shortest."""
    labelled = np.flatnonzero(labelled_counts(rows))[:_LOOKED_AT]
    order = np.argsort(rows.lengths[labelled], kind="stable")
    return [int(sample) for sample in sorted(labelled[order[:_ROWS]])]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
