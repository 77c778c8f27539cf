"""Tokens that a job adds to its base: rows of the embeddings and of the head that are trained.

The base's own matrices stay as they are and as large as they are. Where a job's tokens stand in a
pass, its rows are put in place of the base's; its labels are scored against the base's columns with
its own in their place, or after them. PEFT does the same with ``trainable_token_indices``, under
whose names the rows are saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llamahome.errors import InvalidConfig

if TYPE_CHECKING:
    from llamahome.training.engine.passes import Pass

SAVED_AS = "token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class AddedTokens:
    """Which ids, where the base keeps such rows, and what theirs are at the start: the mean row.

    ``ids`` ascend; those from the size of the base's matrix on follow it without a gap. ``head`` is
    None where the base's head is its embeddings (tied weights).
    """

    ids: tuple[int, ...]
    embeddings: str
    head: str | None
    width: int

    @classmethod
    def of(cls, model: Any, ids: Sequence[int]) -> AddedTokens:
        """Raises InvalidConfig where the base has no such matrices, or a gap before the ids."""
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        rows, width = embeddings.weight.shape
        ordered = tuple(sorted(ids))
        beyond = [one for one in ordered if one >= rows]
        if (
            head is None
            or head.weight.shape[0] != rows
            or beyond != list(range(rows, rows + len(beyond)))
        ):
            raise InvalidConfig(
                f"tokens {list(ordered)} cannot be added to a base with {rows} embeddings",
                field="template", remedy="Use template: auto",
            )  # fmt: skip
        tied = head.weight is embeddings.weight
        return cls(ordered, names[id(embeddings)], None if tied else names[id(head)], int(width))

    def indices(self) -> dict[str, list[int]]:
        """As PEFT's ``trainable_token_indices`` has them: the last part of each matrix's path."""
        matrices = [name for name in (self.embeddings, self.head) if name is not None]
        return {name.rpartition(".")[2]: list(self.ids) for name in matrices}

    def start(self, model: Any) -> dict[str, torch.Tensor]:
        """Each matrix's rows at the start, fp32 [tokens, width], by the matrix's name."""
        starts = {self.embeddings: model.get_input_embeddings().weight}
        if self.head is not None:
            starts[self.head] = model.get_output_embeddings().weight
        return {
            name: weight.detach().float().mean(0).expand(len(self.ids), -1).contiguous()
            for name, weight in starts.items()
        }


@dataclasses.dataclass(frozen=True)
class AddedRows:
    """A slot's rows as views: [tokens, width], in the base's type, and their gradients."""

    ids: tuple[int, ...]
    embeddings: torch.Tensor
    head: torch.Tensor
    grad_embeddings: torch.Tensor
    grad_head: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a slot's rows stand in a pass: row ``which[i]`` at place ``where[i]``."""

    rows: AddedRows
    which: torch.Tensor
    where: torch.Tensor
    scale: float


def embed(model: Any, whole: Pass) -> tuple[torch.Tensor, list[Placed]]:
    """The embeddings of a pass, [T, width], with the slots' own rows in their places.

    Where the pass learns, it is a leaf whose gradient :func:`learn_embeddings` takes.
    """
    matrix = model.get_input_embeddings()
    # Some models (Gemma 3) multiply what they look up; the rows are kept as PEFT has them, before.
    scale = float(getattr(matrix, "scalar_embed_scale", 1.0))
    known = whole.ids.clamp(max=matrix.weight.shape[0] - 1)
    with torch.no_grad():
        embedded: torch.Tensor = matrix(known).clone()
        placed = []
        for segment in whole.segments:
            rows = segment.unit.slot.added
            if rows is None:
                continue
            mine = whole.ids[segment.start : segment.end]
            tokens = torch.tensor(rows.ids, device=mine.device)
            where, which = (mine[:, None] == tokens[None, :]).nonzero(as_tuple=True)
            placed.append(Placed(rows, which, where + segment.start, scale))
            embedded[placed[-1].where] = rows.embeddings[which] * scale
    return embedded.requires_grad_(whole.learns), placed


def learn_embeddings(embedded: torch.Tensor, placed: Sequence[Placed]) -> None:
    """Add what came back at the slots' places to their gradients."""
    if embedded.grad is None:
        return
    for one in placed:
        came = embedded.grad[one.where].to(one.rows.grad_embeddings.dtype) * one.scale
        one.rows.grad_embeddings.index_add_(0, one.which, came)


class AddedColumns:
    """A slot's rows as columns of the logits."""

    def __init__(self, rows: AddedRows, vocabulary: int) -> None:
        self._rows = rows
        inside = [index for index, one in enumerate(rows.ids) if one < vocabulary]
        device = rows.head.device
        self._vocabulary, self._inside = vocabulary, torch.tensor(inside, device=device).long()
        self._ids = torch.tensor(rows.ids, device=device)

    def put(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``logits`` [N, vocabulary] with the slot's own columns in place and after."""
        own = hidden @ self._rows.head.t()
        logits = logits.index_copy(1, self._ids[self._inside], own[:, self._inside])
        return torch.cat([logits, own[:, len(self._inside) :]], 1)

    def take(self, slope: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the slope at such logits: what is the base's, [N, vocabulary] with zeros in the slot's
        columns, and what the slot's columns add to the slope at ``hidden``. Adds to the gradient.
        """
        own = slope[:, self._ids].to(hidden.dtype)
        self._rows.grad_head.add_((own.t() @ hidden).to(self._rows.grad_head.dtype))
        base = slope[:, : self._vocabulary].index_fill(1, self._ids[self._inside], 0.0)
        return base, own @ self._rows.head
