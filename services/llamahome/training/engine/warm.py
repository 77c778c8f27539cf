"""A frozen base that runs passes for the adapters of any number of jobs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
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
from llamahome.training.engine.passes import Pass, Segment, Unit, make_pass, row_block
from llamahome.training.engine.recompute import Recomputation
from llamahome.training.engine.slots import Slot
from llamahome.training.model import LoadedBase, target_modules

_PROBE_LENGTHS = (5, 17, 9)
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclasses.dataclass(frozen=True)
class UnitLoss:
    """A unit's summed cross-entropy in nats, and that sum times the unit's weight."""

    summed: float
    weighted: float


class WarmBase:
    """The base with the engine's layers in it; :meth:`close` takes them out again.

    ``packed`` says whether sequences go through it side by side. Where they cannot (the base does
    not take positions, or its attention is of another kind), ``why_not`` tells the reason, and each
    sequence goes through alone, by the base's own attention: slower, and as right.
    """

    def __init__(self, loaded: LoadedBase, threads: int) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        self.block = row_block(loaded.device, threads)
        self.board = Board(loaded.device, loaded.dtype)
        head = self.model.get_output_embeddings()
        self._sites: dict[str, LoraLinear] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
                self._sites[name] = LoraLinear(name, module, self.board)
                setattr(module, "forward", self._sites[name])  # noqa: B010  # it is no method
        self.recomputation = Recomputation(self.model)
        self._head = Head(head.weight, getattr(head, "bias", None))
        self._own_attention: str = self.model.config._attn_implementation
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
    def transposed(self) -> bool:
        """True where the base keeps its weights as [in, out], as GPT-2 does."""
        return any(isinstance(site.module, Conv1D) for site in self._sites.values())

    def run(self, units: Sequence[Unit]) -> list[UnitLoss]:
        """One pass over units of which all learn, or none. Gradients are added to their slots'.

        Raises torch.OutOfMemoryError; then the slots' gradients hold a part of the pass.
        """
        filled = [unit for unit in units if len(unit.targets)]
        if not filled:
            return [UnitLoss(0.0, 0.0) for _ in units]
        whole = make_pass(filled, self.block, self.loaded.device)
        with torch.set_grad_enabled(whole.learns):
            losses = self._packed(whole) if self.packed else self._one_by_one(whole)
        sums = _sums(whole, losses)
        return [sums[id(unit)] if len(unit.targets) else UnitLoss(0.0, 0.0) for unit in units]

    def logits(self, units: Sequence[Unit]) -> list[torch.Tensor]:
        """The logits at each unit's labelled places, [N, vocabulary], without learning."""
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

    def _try_packed(self) -> str | None:
        """Compare packed logits with the base's own on a few sequences. None, or why not."""
        if found := _unlike_alone(self.model.config):
            return found
        attention.register()
        vocabulary = self.loaded.vocabulary
        context = self.loaded.context or max(_PROBE_LENGTHS)
        draw = np.random.default_rng(0)
        rows = [
            draw.integers(0, vocabulary, min(length, context)).astype(np.int32)
            for length in _PROBE_LENGTHS
        ]
        probe = Slot.without_layers(self.loaded.device, self.loaded.dtype)
        units = [
            Unit(probe, (row,), np.arange(len(row)), np.zeros(len(row), np.int64), 1.0, False)
            for row in rows
        ]
        with torch.no_grad():
            own = [
                self.model(
                    input_ids=torch.from_numpy(row)[None].long().to(self.loaded.device),
                    use_cache=False,
                ).logits[0]
                for row in rows
            ]
            try:
                self.model.set_attn_implementation(attention.NAME)
                if self.model.config._attn_implementation != attention.NAME:
                    raise NotImplementedError("its attention cannot be replaced")
                self.packed = True
                ours = self.logits(units)
            except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
                self._back_to_own()
                return f"{type(error).__name__}: {error}"
        gap = max(float((a.cpu() - b).abs().max()) for a, b in zip(own, ours, strict=True))
        scale = max(1.0, *(float(each.abs().max()) for each in own))
        if not gap <= _CLOSE[self.loaded.dtype] * scale:
            self._back_to_own()
            return f"packed logits differ from the base's own by {gap:.3g}"
        return None

    def _back_to_own(self) -> None:
        self.packed = False
        self.model.set_attn_implementation(self._own_attention)


def _unlike_alone(config: Any) -> str | None:
    """What in a base's config makes a packed row unlike the row alone, where a probe of a few short
    rows cannot see it; None where nothing does."""
    text = config.get_text_config()
    # The longest row of a pass would choose the frequencies of all its rows.
    if "longrope" in json.dumps(getattr(text, "rope_parameters", None), default=str):
        return "its rotary frequencies depend on the longest row of a pass (longrope)"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            return f"its logits are not the head's alone ({name})"
    return None


def _rows_of(segment: Segment, device: torch.device) -> list[Pass]:
    """Each of its sequences as a pass of its own."""
    unit, place, passes = segment.unit, 0, []
    for row in unit.rows:
        mine = (unit.places >= place) & (unit.places < place + len(row))
        alone = dataclasses.replace(
            unit, rows=(row,), places=unit.places[mine] - place, targets=unit.targets[mine],
            first=unit.first + place,
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
