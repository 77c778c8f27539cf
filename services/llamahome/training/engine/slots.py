"""A slot: everything of one job's adapter, in flat buffers with the matrices as views into them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from llamahome.config.training import LoraConfig
from llamahome.training.continuing import check_same_layers
from llamahome.training.engine.added import SAVED_AS, AddedRows, AddedTokens
from llamahome.training.engine.draws import Dropout, start_values

# Names a slot for good: an id() is given again when a slot is gone.
_SERIALS = itertools.count()
_ALIGNMENT = 16  # elements; a matrix that begins at a cache line is multiplied the same everywhere


@dataclasses.dataclass(frozen=True)
class Pair:
    """One layer's adapter as views: ``a`` [r, in] and ``b`` [out, r] in the base's type, which
    compute; their gradients in the master's type."""

    a: torch.Tensor
    b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SiteShape:
    """A linear layer that can carry an adapter: its path in the base, and its widths."""

    name: str
    columns: int  # in
    rows: int  # out


class Slot:
    """One adapter: fp32 master weights, a copy in the base's type, gradients and AdamW's state.

    Buffers are new and zeroed with each slot, so nothing of an earlier job can be in them.
    """

    def __init__(
        self,
        lora: LoraConfig,
        sites: Iterable[SiteShape],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        target_modules: Sequence[str] = (),
        tokens: AddedTokens | None = None,
    ) -> None:
        """``dtype`` is the base's. Weights are LoRA's start values of ``seed``.

        ``target_modules`` are the sites' names as PEFT's config has them; ``tokens`` those that the
        job adds to the base, whose rows begin as :meth:`start_rows` is told.
        """
        self.target_modules = tuple(target_modules)
        self.serial = next(_SERIALS)
        self.version = 0  # of the computing copy
        self.dropout = Dropout.of(lora.dropout)
        self.rank = lora.r
        self.scale = lora.alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        self._views: dict[str, tuple[int, tuple[int, int]]] = {}
        size = 0
        self._sites = tuple(sorted(sites, key=lambda site: site.name))
        for site in self._sites:
            for half, shape in (("A", (lora.r, site.columns)), ("B", (site.rows, lora.r))):
                size = self._place(f"{site.name}.lora_{half}.weight", shape, size)
        self.tokens = tokens
        for name in _matrices(tokens):
            assert tokens is not None
            size = self._place(f"{name}.{SAVED_AS}", (len(tokens.ids), tokens.width), size)
        master = torch.float64 if dtype is torch.float64 else torch.float32
        self.weights = torch.nn.Parameter(torch.zeros(size, dtype=master, device=device))
        self.gradient = torch.zeros(size, dtype=master, device=device)
        self.weights.grad = self.gradient
        self._compute = self.weights.data if dtype is master else self.weights.data.to(dtype)
        self._kept = torch.zeros_like(self.gradient)  # room that is lacking later ends the job
        self._began: torch.Tensor | None = None  # an earlier adapter's; None: B began as zeros
        self.pairs: Mapping[str, Pair] = {site.name: self._pair(site.name) for site in self._sites}
        for site in self._sites:
            start = start_values(seed, site.name, lora.r, site.columns)
            self._view(self.weights.data, f"{site.name}.lora_A.weight").copy_(start)
        self.added = self._added_rows()
        self.refresh()

    @classmethod
    def without_layers(cls, device: torch.device, dtype: torch.dtype) -> Slot:
        """A slot that adapts nothing: for looking at the base as it is."""
        return cls(LoraConfig(), (), 0, device, dtype)

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(shape) for _, shape in self._views.values())

    def _place(self, name: str, shape: tuple[int, int], begin: int) -> int:
        """Give a matrix its place in the buffers. Returns where the next one begins."""
        self._views[name] = (begin, shape)
        return begin + math.ceil(math.prod(shape) / _ALIGNMENT) * _ALIGNMENT

    def _added_rows(self) -> AddedRows | None:
        if self.tokens is None:
            return None
        embeddings = f"{self.tokens.embeddings}.{SAVED_AS}"
        head = embeddings if self.tokens.head is None else f"{self.tokens.head}.{SAVED_AS}"
        return AddedRows(
            self.tokens.ids,
            self._view(self._compute, embeddings), self._view(self._compute, head),
            self._view(self.gradient, embeddings), self._view(self.gradient, head),
        )  # fmt: skip

    def start_rows(self, starts: Mapping[str, torch.Tensor]) -> None:
        """Set the added tokens' rows, by the name of their matrix in the base."""
        for name, rows in starts.items():
            self._view(self.weights.data, f"{name}.{SAVED_AS}").copy_(rows)
        self.refresh()

    def _view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        first, shape = self._views[name]
        return flat[first : first + math.prod(shape)].view(shape)

    def _pair(self, site: str) -> Pair:
        a, b = f"{site}.lora_A.weight", f"{site}.lora_B.weight"
        return Pair(
            self._view(self._compute, a), self._view(self._compute, b),
            self._view(self.gradient, a), self._view(self.gradient, b),
        )  # fmt: skip

    def refresh(self) -> None:
        """Bring the computing copy up to date with the master weights."""
        self.version += 1
        if self._compute is not self.weights.data and self._compute.dtype != self.weights.dtype:
            self._compute.copy_(self.weights.data)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights on the CPU, a copy, named and ordered as PEFT saves them."""
        return self.named(self.weights.data)

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat buffer of this slot's layout as named matrices on the CPU, a copy."""
        named = {
            f"base_model.model.{name}": self._view(flat, name)
            .detach()
            .to("cpu", copy=True)
            .contiguous()
            for name in self._views
        }
        return dict(sorted(named.items()))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], into: torch.Tensor | None = None) -> None:
        """The inverse of :meth:`named`, into the weights or another flat buffer of this layout."""
        flat = self.weights.data if into is None else into
        for name in self._views:
            self._view(flat, name).copy_(tensors[f"base_model.model.{name}"])
        if into is None:
            self.refresh()

    def start_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin with an earlier adapter's weights. Raises InvalidConfig for those of another."""
        shapes = {f"base_model.model.{n}": shape for n, (_, shape) in self._views.items()}
        check_same_layers(tensors, shapes)
        self.load(tensors)
        self._began = self.weights.data.clone()

    def moved(self) -> bool:
        """True where every B has learned something finite: it is no more what it began as."""
        weights, began = self.weights.data, self._began
        ups = [
            self._view(weights, name) - (0 if began is None else self._view(began, name))
            for name in self._views
            if name.endswith(".lora_B.weight")
        ]
        return all(bool(up.any()) for up in ups) and self.is_finite()

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return bool(self.weights.data.isfinite().all())

    def keep_gradient(self) -> None:
        """Remember the gradient, so that a pass that breaks off half-way can be undone."""
        self._kept.copy_(self.gradient)

    def undo_gradient(self) -> None:
        """Back to what :meth:`keep_gradient` saw."""
        self.gradient.copy_(self._kept)


def _matrices(tokens: AddedTokens | None) -> list[str]:
    """The names of the base's matrices that get rows of their own."""
    if tokens is None:
        return []
    return [name for name in (tokens.embeddings, tokens.head) if name is not None]
