"""Cross-entropy over labelled tokens only, in pieces: no large block of logits ever exists."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from llamahome.training.engine.added import AddedColumns

_BLOCK_BYTES = 64 * 1024 * 1024  # of logits at a time


@dataclasses.dataclass(frozen=True)
class Head:
    """The frozen output layer: ``weight`` [vocabulary, hidden], ``bias`` [vocabulary] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @torch.no_grad()
    def losses(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        block: int,
        *,
        learns: bool,
        added: AddedColumns | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each label's cross-entropy in nats, [N] in fp32 or wider, and what its weighted sum's
        gradient is at ``hidden`` [N, hidden] (None unless ``learns``).

        The gradient is taken at once, while the logits are there: softmax(z) - onehot(target).
        Rows are filled up to a multiple of ``block``, as in every product of the engine. ``added``
        are columns of the job's own.
        """
        wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if learns else None
        rows = max(1, _BLOCK_BYTES // (4 * self.weight.shape[0]) // block) * block
        for first in range(0, len(targets), rows):
            last = min(first + rows, len(targets))
            piece, count = hidden[first:last], last - first
            filled = functional.pad(piece, (0, 0, 0, -count % block))
            logits = functional.linear(filled, self.weight, self.bias)[:count]
            if added is not None:
                logits = added.put(logits, piece)
            log_p = torch.log_softmax(logits.to(wide), -1)
            chosen = targets[first:last, None]
            losses[first:last] = -log_p.gather(1, chosen).squeeze(1)
            if gradient is not None:
                slope = log_p.exp_()
                slope.scatter_add_(1, chosen, torch.full_like(slope[:, :1], -1.0))
                slope.mul_(weights[first:last, None].to(wide))
                own = None
                if added is not None:
                    slope, own = added.take(slope, piece)
                filled = functional.pad(slope.to(hidden.dtype), (0, 0, 0, -count % block))
                gradient[first:last] = (filled @ self.weight)[:count]
                if own is not None:
                    gradient[first:last] += own
        return losses, gradient
