"""A frozen base that runs passes for the adapters of any number of jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llamahome.config import TrainingConfig
from llamahome.errors import InvalidConfig
from llamahome.training.engine import attention
from llamahome.training.engine.added import (
    AddedColumns,
    AddedRows,
    AddedTokens,
    Placed,
    embed,
    learn_embeddings,
)
from llamahome.training.engine.lora import Board, LoraLinear
from llamahome.training.engine.losses import Head
from llamahome.training.engine.memory import is_out_of_memory
from llamahome.training.engine.passes import Pass, Segment, Unit, make_pass, row_block
from llamahome.training.engine.probe import (
    own_logits,
    probe_rows,
    probe_units,
    unlike_head,
    unlike_in_bits,
    unlike_own,
    unlike_shorter,
)
from llamahome.training.engine.recompute import Recomputation
from llamahome.training.engine.slots import Slot
from llamahome.training.gauges import PeakMemory
from llamahome.training.model import LoadedBase, target_modules


@dataclasses.dataclass(frozen=True)
class UnitLoss:
    """A unit's summed cross-entropy in nats, and that sum times the unit's weight."""

    summed: float
    weighted: float


class WarmBase:
    """The base with the engine's layers in it; :meth:`close` takes them out again.

    ``packed`` says whether sequences go through it side by side. Where they cannot (the base does
    not take positions, or its attention is of another kind), ``why_not`` tells the reason, and each
    sequence goes through alone, by the base's own attention: slower, and as right. ``why_apart`` is
    set where they can, but a unit must have its pass to itself to have the bits that it has alone.
    """

    def __init__(self, loaded: LoadedBase, threads: int) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        self.block = row_block(loaded.device, threads)
        self.board = Board(loaded.device, loaded.dtype)
        self.peak_memory = PeakMemory(loaded.device)
        head = self.model.get_output_embeddings()
        self._sites: dict[str, LoraLinear] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
                self._sites[name] = LoraLinear(name, module, self.board)
                setattr(module, "forward", self._sites[name])  # noqa: B010  # it is no method
        self.recomputation = Recomputation(self.model)
        self._head = Head(head.weight, getattr(head, "bias", None))
        self._own_attention: str = self.model.config._attn_implementation
        self.why_apart: str | None = None
        self.why_not = self._try_packed()
        self.packed = self.why_not is None

    def close(self) -> None:
        """Leave the base as it came."""
        self.recomputation.close()
        for site in self._sites.values():
            del site.module.forward
        if self.packed:
            self.model.set_attn_implementation(self._own_attention)

    def site(self, name: str) -> LoraLinear:
        """The layer at a path of the base. Raises KeyError."""
        return self._sites[name]

    def slot_for(self, config: TrainingConfig, added: Sequence[int] = ()) -> Slot:
        """A fresh slot with the config's LoRA, and rows for the ids ``added`` to the base.

        Raises InvalidConfig for modules that are not in the base, and for tokens that cannot be
        added to it.
        """
        names = target_modules(self.model, config.lora.target_modules)
        shapes = [
            site.shape
            for name, site in self._sites.items()
            if any(name == wanted or name.endswith(f".{wanted}") for wanted in names)
        ]
        if added and self.why_not is not None:
            raise InvalidConfig(
                "tokens can be added only to a base that takes rows side by side: "
                + self.why_not, field="template", remedy="Use template: auto",
            )  # fmt: skip
        tokens = AddedTokens.of(self.model, added) if added else None
        slot = Slot(
            config.lora, shapes, config.seed, self.loaded.device, self.loaded.dtype, names, tokens
        )
        if tokens is not None:
            slot.start_rows(tokens.start(self.model))
        return slot

    @property
    def shares_passes(self) -> bool:
        """Whether units go through it side by side."""
        return self.packed and self.why_apart is None

    @property
    def transposed(self) -> bool:
        """True where the base keeps its weights as [in, out], as GPT-2 does."""
        return any(isinstance(site.module, Conv1D) for site in self._sites.values())

    def run(self, units: Sequence[Unit]) -> list[UnitLoss]:
        """One pass over units of which all learn, or none. Gradients are added to their slots'.
        One unit at a time where there is a reason, ``why_apart``.

        Raises torch.OutOfMemoryError; then the slots' gradients hold a part of the pass.
        """
        filled = [unit for unit in units if len(unit.targets)]
        if not filled:
            return [UnitLoss(0.0, 0.0) for _ in units]
        assert self.why_apart is None or len(filled) == 1, self.why_apart
        whole = make_pass(filled, self.block, self.loaded.device)
        with torch.set_grad_enabled(whole.learns):
            losses = self._packed(whole) if self.packed else self._one_by_one(whole)
        sums = _sums(whole, losses)
        return [sums[id(unit)] if len(unit.targets) else UnitLoss(0.0, 0.0) for unit in units]

    def logits(self, units: Sequence[Unit]) -> list[torch.Tensor]:
        """The logits at each unit's labelled places, [N, vocabulary], without learning."""
        if self.why_apart is not None and len(units) > 1:
            return [self.logits([unit])[0] for unit in units]
        whole = make_pass(units, self.block, self.loaded.device)
        if not self.packed:
            return [self._logits_row_by_row(segment) for segment in whole.segments]
        with torch.no_grad(), self.board.showing(whole.segments, len(whole.ids)):
            embedded, _ = self._embedded(whole)
            hidden = self._hidden(whole, embedded)[whole.places]
            filled = functional.pad(hidden, (0, 0, 0, -len(hidden) % self.block))
            logits = functional.linear(filled, self._head.weight, self._head.bias)
            return [self._own_logits(s, logits, hidden).cpu() for s in whole.segments]

    def _own_logits(
        self, segment: Segment, logits: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        mine = slice(segment.first_label, segment.last_label)
        rows = segment.unit.slot.added
        if rows is None:
            return logits[mine]
        return AddedColumns(rows, self.loaded.vocabulary).put(logits[mine], hidden[mine])

    def _packed(self, whole: Pass) -> torch.Tensor:
        with self.board.showing(whole.segments, len(whole.ids)):
            embedded, placed = self._embedded(whole)
            hidden = self._hidden(whole, embedded).index_select(0, whole.places)
            losses, gradient = self._losses(whole, hidden.detach())
            if gradient is not None and hidden.requires_grad:
                hidden.backward(gradient)  # type: ignore[no-untyped-call]
            if embedded is not None:
                learn_embeddings(embedded, placed)
        return losses

    def _embedded(self, whole: Pass) -> tuple[torch.Tensor | None, list[Placed]]:
        """The embeddings, where a job has tokens of its own; the model looks them up otherwise."""
        if all(segment.unit.slot.added is None for segment in whole.segments):
            return None, []
        return embed(self.model, whole)

    def _hidden(self, whole: Pass, embedded: torch.Tensor | None) -> torch.Tensor:
        """What comes before the head, [T, hidden]."""
        given = (
            {"input_ids": whole.ids[None]}
            if embedded is None
            else {"inputs_embeds": embedded[None]}
        )
        output = self.model.get_decoder()(
            **given, position_ids=whole.positions[None], use_cache=False,
            sequence_lengths=whole.lengths,
        )  # fmt: skip
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[0]

    def _losses(
        self, whole: Pass, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`Head.losses`, over the pass; jobs with tokens of their own by themselves."""
        found = []
        for first, last, rows in _label_runs(whole.segments):
            added = None if rows is None else AddedColumns(rows, self.loaded.vocabulary)
            mine = slice(first, last)
            found.append(
                self._head.losses(
                    hidden[mine], whole.targets[mine], whole.weights[mine], self.block,
                    learns=whole.learns, added=added,
                )
            )  # fmt: skip
        gradients = [gradient for _, gradient in found if gradient is not None]
        losses = torch.cat([each for each, _ in found])
        return losses, torch.cat(gradients) if gradients else None

    @torch.no_grad()
    def _logits_row_by_row(self, segment: Segment) -> torch.Tensor:
        found = []
        for row in _rows_of(segment, self.loaded.device):
            with self.board.showing(row.segments, len(row.ids)):
                found.append(self._alone(row, row.segments[0]).cpu())
        return torch.cat(found)

    def _one_by_one(self, whole: Pass) -> torch.Tensor:
        """Each segment's rows alone, by the base's own forward."""
        losses = []
        for row in [row for each in whole.segments for row in _rows_of(each, whole.ids.device)]:
            with self.board.showing(row.segments, len(row.ids)):
                logits = self._alone(row, row.segments[0])
                wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
                each = functional.cross_entropy(logits.to(wide), row.targets, reduction="none")
                if whole.learns and each.requires_grad:
                    (each * row.weights.to(wide)).sum().backward()  # type: ignore[no-untyped-call]
            losses.append(each.detach())
        return torch.cat(losses)

    def _alone(self, whole: Pass, segment: Segment) -> torch.Tensor:
        """Logits at the labelled places of a pass of one sequence."""
        assert len(whole.lengths) == 1
        ids = whole.ids[None, : segment.end]
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0, whole.places]

    @torch.no_grad()
    def _try_packed(self) -> str | None:
        """Compare packed logits with the base's own on a few sequences. None, or why not."""
        if found := unlike_shorter(self.model.config):
            return found
        rows = probe_rows(self.loaded)
        units = probe_units(rows, self.loaded)
        own = [own_logits(self.loaded, row) for row in rows]
        try:
            if found := unlike_head(self.loaded, self._head, rows, own):
                return found
            attention.register()
            self.model.set_attn_implementation(attention.NAME)
            if self.model.config._attn_implementation != attention.NAME:
                raise NotImplementedError("its attention cannot be replaced")
            self.packed = True
            ours = self.logits(units)
            if (found := unlike_own(self.loaded, ours, own)) is None:
                alone = [self.logits([unit])[0] for unit in units]
                self.why_apart = unlike_in_bits(self.loaded, ours, alone)
        except Exception as error:  # whatever a base may do with what it was not made for
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise  # which says nothing of the base
            found = f"{type(error).__name__}: {error}"
        if found is not None:
            self._back_to_own()
        return found

    def _back_to_own(self) -> None:
        self.packed = False
        self.model.set_attn_implementation(self._own_attention)


def _rows_of(segment: Segment, device: torch.device) -> list[Pass]:
    """Each of its sequences as a pass of its own."""
    unit, place, passes = segment.unit, 0, []
    for row in unit.rows:
        mine = (unit.places >= place) & (unit.places < place + len(row))
        alone = dataclasses.replace(
            unit, rows=(row,), places=unit.places[mine] - place, targets=unit.targets[mine],
            first=unit.first + place, whole=unit.micro_batch_tokens,
        )  # fmt: skip
        passes.append(make_pass([alone], 1, device))
        place += len(row)
    return passes


def _label_runs(segments: Sequence[Segment]) -> list[tuple[int, int, AddedRows | None]]:
    """(first label, last label, the job's own rows): jobs without any are taken together."""
    runs: list[tuple[int, int, AddedRows | None]] = []
    for segment in segments:
        rows = segment.unit.slot.added
        if runs and rows is None and runs[-1][2] is None:
            runs[-1] = (runs[-1][0], segment.last_label, None)
        else:
            runs.append((segment.first_label, segment.last_label, rows))
    return runs


def _sums(whole: Pass, losses: torch.Tensor) -> dict[int, UnitLoss]:
    """Each unit's loss, in float64: over its own labels alone, whatever else is in the pass."""
    found = {}
    values = losses.double().cpu()
    for segment in whole.segments:
        summed = float(values[segment.first_label : segment.last_label].sum())
        found[id(segment.unit)] = UnitLoss(summed, summed * segment.unit.weight)
    return found
