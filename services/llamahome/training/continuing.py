"""The weights of an earlier adapter, checked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llamahome.config import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    TrainingConfig,
    read_adapter_config,
)
from llamahome.errors import CorruptArtifact, InvalidConfig
from llamahome.training.checkpoints import Tensors


def load_start(
    folder: Path, config: TrainingConfig, name: str, added: tuple[int, ...] = ()
) -> Tensors:
    """The adapter in ``folder``, as PEFT saves one. ``name`` is what error texts call it,
    ``added`` the ids of the tokens that the job's data have beyond the base's.

    Raises InvalidConfig where it is none, was trained with another LoRA than ``config`` has, or
    holds numbers that are not finite; CorruptArtifact where its weights cannot be read.
    """
    for file in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise _unusable(name, f"has no {file} (pickled weights are never loaded)")
    earlier = read_adapter_config((folder / ADAPTER_CONFIG_NAME).read_bytes(), name)
    earlier.check(config)
    if earlier.tokens != added:
        raise _other(f"adds the tokens {list(earlier.tokens)}, and the job's data {list(added)}")
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(
            f"cannot be read: {error}", file=f"{name}/{ADAPTER_WEIGHTS_NAME}"
        ) from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise _unusable(name, f"has numbers in {key} that are not finite ({tensor.dtype})")
    return tensors


def check_same_layers(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, int]]
) -> None:
    """Raises InvalidConfig unless the weights are the ``wanted`` ones, by name and shape."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise _other(f"lacks {len(missing)} of {len(wanted)} weights, the first is {missing[0]}")
    if extra:
        raise _other(f"has {len(extra)} weights that this job has not, the first is {extra[0]}")
    for name, shape in sorted(wanted.items()):
        if (has := tuple(found[name].shape)) != shape:
            raise _other(f"has {name} of shape {list(has)}, and the job's is {list(shape)}")


def _other(what: str) -> InvalidConfig:
    return InvalidConfig(
        f"the earlier adapter {what}", code="adapter_mismatch", field="model",
        remedy="Go on from an adapter of this very base, with its own lora settings",
    )  # fmt: skip


def _unusable(name: str, why: str) -> InvalidConfig:
    return InvalidConfig(f"adapter {name!r} {why}", code="invalid_adapter", field="model")
