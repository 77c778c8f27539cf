"""The loss, and its mean over the validation rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from llamahome.conversations.tokens import TokenRows
from llamahome.training.data import IGNORED, Batch, labelled_counts, make_batch
from llamahome.training.runtime import Machine


def summed_loss(model: Any, batch: Batch, machine: Machine) -> torch.Tensor:
    """Cross-entropy in nats, summed over the batch's labels, fp32 scalar.

    Only positions at which some row has a label reach the output head. The batch must have one.
    """
    device = machine.device
    positions = torch.from_numpy(batch.positions).to(device)
    with machine.autocast():
        given: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.ids).to(device),
            "attention_mask": torch.from_numpy(batch.mask).to(device),
            "use_cache": False,
        }
        if takes_positions(model):
            logits = model(**given, logits_to_keep=positions).logits
        else:
            logits = model(**given).logits[:, positions]
    labels = torch.from_numpy(batch.labels).to(device)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def takes_positions(model: Any) -> bool:
    """True where the base computes logits at chosen positions only, as most in transformers do."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@torch.no_grad()
def evaluate(
    model: Any,
    rows: TokenRows,
    batch_size: int,
    machine: Machine,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross-entropy per labelled token over all rows, in nats, without dropout.

    Rows are taken in their own order. The mean is over tokens, not over batches.
    NaN where no row has a label.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for first in range(0, len(rows), batch_size):
            on_batch()
            batch = make_batch(rows, range(first, min(first + batch_size, len(rows))))
            if batch.labelled:
                total += float(summed_loss(model, batch, machine))
    finally:
        model.train(was_training)
    labelled = int(labelled_counts(rows).sum())
    return total / labelled if labelled else float("nan")
