"""The base model: loaded from its folder, frozen, and checked against what a job wants of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from llamahome.config import TrainingConfig
from llamahome.errors import InvalidConfig, InvalidData, InvalidState, NotFound
from llamahome.schemas import BaseRef
from llamahome.storage.bases import base_digest
from llamahome.training.data import TokenData, largest_id, longest_row
from llamahome.training.runtime import Machine

_SUM_CHUNK = 1 << 24  # values at a time: 128 MiB of 64-bit integers


@dataclasses.dataclass(frozen=True)
class LoadedBase:
    """A frozen base. ``checksum`` is taken of its weights in memory, right after loading."""

    ref: BaseRef
    device: torch.device
    dtype: torch.dtype
    model: Any
    checksum: str

    def serves(self, ref: BaseRef, machine: Machine) -> bool:
        """True where a job can use it as it is."""
        return (self.ref.path, self.ref.digest, self.device, self.dtype) == (
            ref.path, ref.digest, machine.device, machine.base_dtype,
        )  # fmt: skip

    @property
    def context(self) -> int | None:
        """Tokens that fit, or None where the base sets no limit."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])


def load_base(ref: BaseRef, machine: Machine) -> LoadedBase:
    """The base from its local folder, safetensors only and without code of its own.

    Raises NotFound (no folder) and InvalidConfig (not a model that may be loaded).
    """
    folder = Path(ref.path)
    _check_folder(folder, ref.name)
    _check_digest(folder, ref)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=machine.base_dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise _unusable(ref.name, f"cannot be loaded: {error}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise _unusable(ref.name, f"lacks {len(missing)} weights, the first is {missing[0]}")
    model.requires_grad_(False)
    model.to(machine.device)
    model.eval()
    return LoadedBase(ref, machine.device, machine.base_dtype, model, checksum(model))


def _check_digest(folder: Path, ref: BaseRef) -> None:
    """The job was accepted with these very files; reading them once costs a cold start a little."""
    found = base_digest(folder)
    if found != ref.digest:
        raise InvalidState(
            f"the folder of base {ref.name!r} has digest {found[:12]}, and the job was accepted "
            f"with {ref.digest[:12]}", code="base_changed", file=str(folder),
            remedy="Put the files back, or register the folder again and submit anew",
        )  # fmt: skip


def _check_folder(folder: Path, name: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise NotFound(
            f"base {name!r} has no config.json on this worker", code="model_not_found",
            remedy="Register the base with a folder that every training worker sees",
        )  # fmt: skip
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unusable(name, f"has a broken config.json: {error}") from None
    if "auto_map" in content:
        raise _unusable(name, "brings code of its own (auto_map), which is never run")
    if not any(folder.glob("*.safetensors")):
        raise _unusable(name, "has no safetensors weights (pickled ones are never loaded)")


def _unusable(name: str, why: str) -> InvalidConfig:
    return InvalidConfig(f"base {name!r} {why}", code="invalid_base", field="model")


def checksum(model: Any) -> str:
    """sha256 over every weight and buffer, in the order of their names.

    Over the bytes on a CPU; on a GPU over sums that are taken there (:func:`sums_of`), since to
    bring all weights over and hash them would stop every job for many seconds.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.is_cuda:
            state.update(repr(sums_of(tensor)).encode())
        else:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            state.update(flat.numpy().data)
    return state.hexdigest()


@torch.no_grad()
def sums_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Two sums modulo 2^64 over a tensor's bits, taken where it lies: plain, and each value times
    an odd number of its place. They tell of any one change, and of values that change places.

    It guards against mistakes and broken memory, not against somebody who means to deceive it.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().reshape(-1).view(bits)
    plain = placed = 0
    for first in range(0, len(flat), _SUM_CHUNK):
        values = flat[first : first + _SUM_CHUNK].long()
        places = torch.arange(first, first + len(values), device=flat.device) * 2 + 1
        plain += int(values.sum())
        placed += int((values * places).sum())
    return plain % 2**64, placed % 2**64


def check_fits(base: LoadedBase, data: TokenData, config: TrainingConfig) -> None:
    """Raises InvalidConfig (a row is longer than the context) or InvalidData (foreign token)."""
    longest, limit = longest_row(data), base.context
    if limit is not None and longest > limit:
        raise InvalidConfig(
            f"the longest row has {longest} tokens, but base {base.ref.name!r} has a context of "
            f"{limit} (max_length is {config.max_length})", field="max_length",
            remedy=f"Set max_length to {limit} or less",
        )  # fmt: skip
    largest = largest_id(data)
    if largest >= max(base.vocabulary, *(one + 1 for one in data.added), 0):
        raise InvalidData(
            f"token id {largest} is in the data, but base {base.ref.name!r} has "
            f"{base.vocabulary} tokens", remedy="Prepare the data with this base's tokenizer",
        )  # fmt: skip


def target_modules(model: Any, wanted: tuple[str, ...] | str) -> list[str]:
    """The names to adapt, sorted. Raises InvalidConfig naming those that exist.

    Linear layers only, and never the output head: it may be tied to the embeddings, and servers do
    not load adapters on it.
    """
    head = model.get_output_embeddings()
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]
    # A bare number is no name of a kind of layer: there the whole path stands.
    leaves = {path.rpartition(".")[2] for path in paths}
    names = {leaf for leaf in leaves if not leaf.isdigit()}
    names |= {path for path in paths if path.rpartition(".")[2].isdigit()}
    if wanted == "all-linear":
        return sorted(names)
    for name in wanted:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise InvalidConfig(
                f"the base has no linear layer {name!r}", field="lora.target_modules",
                remedy=f"It has: {', '.join(sorted(names))}",
            )  # fmt: skip
    return sorted(wanted)
