"""A base with an adapter added into its weights: a folder that transformers loads by itself.

Each file of the base's weights is copied as it is, and in the copy the bytes of the adapted weights
are written over with W + scale B A, added in fp32 and rounded to the type that W has in its file.
One weight is in memory at a time, and the base in use is neither read nor written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llamahome.errors import InvalidConfig, Stopped, TrainingFailed

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIGS = ("config.json", "generation_config.json")
_COPIED_BYTES = 16 * 1024 * 1024  # at a time: one who wants it stopped waits for no more
_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer to merge into: its path in the model, and whether it keeps W as [in, out]."""

    name: str
    shape: tuple[int, int]  # of its weight as it keeps it
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a weight lies: its file, its name there, and the first of its bytes."""

    file: str
    key: str
    first_byte: int
    shape: tuple[int, ...]
    dtype: str  # as safetensors has it


@dataclasses.dataclass(frozen=True)
class Merging:
    """A base's folder, all files of its weights, and where the layers' weights lie in them."""

    base: Path
    files: tuple[str, ...]
    places: Mapping[str, tuple[Layer, Place]]

    @property
    def dtypes(self) -> list[str]:
        return sorted({_FLOATS[place.dtype] for _, place in self.places.values()})


def plan_merge(base: Path, layers: Iterable[Layer], prefix: str) -> Merging:
    """Find every layer's weight in the files. ``prefix`` is the one that a base may leave out.

    Raises InvalidConfig where a weight is not there as the model has it: quantised, fused with
    others, or of another name.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise _cannot("its weights are quantised")
    files = _weight_files(base)
    known = {place.key: place for file in files for place in _read_header(base, file)}
    places = {}
    for layer in layers:
        key = f"{layer.name}.weight"
        place = known.get(key) or known.get(key.removeprefix(f"{prefix}."))
        if place is None:
            raise _cannot(f"its files have no {key}")
        if place.dtype not in _FLOATS or place.shape != layer.shape:
            raise _cannot(
                f"its files have {key} as {place.dtype} {list(place.shape)}, and the model has it "
                f"as {list(layer.shape)}"
            )
        places[layer.name] = (layer, place)
    return Merging(base, tuple(files), places)


def write_merged(
    merging: Merging,
    target: Path,
    halves: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    *,
    beat: Callable[[], None],
    stopped: Callable[[], bool],
) -> None:
    """Write the whole model below ``target``, which is made. ``halves`` are each layer's (A, B).

    ``beat`` is called, and ``stopped`` asked, at each weight and each piece of a copy. Raises
    Stopped once ``stopped`` says so, TrainingFailed where a sum does not fit its type, OSError.
    """
    target.mkdir(parents=True)
    for name in _CONFIGS + (_INDEX,):
        if (merging.base / name).is_file():
            shutil.copyfile(merging.base / name, target / name)
    by_file = defaultdict(list)
    for layer, place in merging.places.values():
        by_file[place.file].append((layer, place))
    for file in merging.files:
        _copy(merging.base / file, target / file, beat, stopped)
        with (target / file).open("r+b") as out, _opened(merging.base / file) as source:
            for layer, place in by_file[file]:
                _check(stopped)
                weight = _added(source.get_tensor(place.key), *halves[layer.name], scale, layer)
                out.seek(place.first_byte)
                out.write(weight.contiguous().view(torch.uint8).numpy().data)
                beat()


def _copy(
    source: Path, target: Path, beat: Callable[[], None], stopped: Callable[[], bool]
) -> None:
    with source.open("rb") as whole, target.open("xb") as out:
        while piece := whole.read(_COPIED_BYTES):
            _check(stopped)
            out.write(piece)
            beat()


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Stopped("stopped while it was merged")


def read_merged(merging: Merging, target: Path, name: str) -> torch.Tensor:
    """A layer's merged weight from its file, [out, in]."""
    layer, place = merging.places[name]
    with _opened(target / place.file) as source:
        weight: torch.Tensor = source.get_tensor(place.key)
    return weight.t() if layer.transposed else weight


def _added(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, layer: Layer
) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = (b.to(wide) @ a.to(wide)).mul_(scale)
    merged = update.t().add(weight) if layer.transposed else update.add_(weight)
    rounded = merged.to(weight.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise TrainingFailed(
            f"{layer.name}: a merged weight does not fit {weight.dtype}", code="merge_failed",
            remedy="Use the adapter as it is: train without lora.merge",
        )  # fmt: skip
    return rounded


def _weight_files(base: Path) -> list[str]:
    """In the order in which transformers looks for them."""
    if (base / _SINGLE).is_file():
        return [_SINGLE]
    if not (base / _INDEX).is_file():
        raise _cannot(f"it has neither {_SINGLE} nor {_INDEX}")
    index = json.loads((base / _INDEX).read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    if bad := [file for file in files if Path(file).name != file]:
        raise _cannot(f"its index names {bad[0]!r}, which is outside its folder")
    return files


def _read_header(base: Path, file: str) -> list[Place]:
    """safetensors: a length in 8 bytes, so much JSON, then the weights at the offsets it names."""
    with (base / file).open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header: dict[str, Any] = json.loads(source.read(length))
    header.pop("__metadata__", None)
    found = []
    for key, entry in header.items():
        first, end = entry["data_offsets"]
        place = Place(file, key, 8 + length + first, tuple(entry["shape"]), entry["dtype"])
        if place.dtype in _FLOATS:
            size = math.prod(place.shape) * getattr(torch, _FLOATS[place.dtype]).itemsize
            assert end - first == size, f"{file}: {key} has {end - first} bytes, not {size}"
        found.append(place)
    return found


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _cannot(why: str) -> InvalidConfig:
    return InvalidConfig(
        f"this base cannot be merged into: {why}", field="lora.merge",
        remedy="Train without lora.merge, and merge the adapter with PEFT",
    )  # fmt: skip
