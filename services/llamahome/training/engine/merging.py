"""``lora.merge``: the adapter added into a copy of its base, beside the other jobs' training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llamahome.conversations.tokens import TokenRows
from llamahome.errors import InvalidConfig, OperatorError
from llamahome.schemas import JsonObject
from llamahome.training.engine.checks import some_rows
from llamahome.training.engine.lora import LoraLinear
from llamahome.training.engine.passes import Unit, make_unit
from llamahome.training.engine.slots import Slot
from llamahome.training.engine.warm import UnitLoss, WarmBase
from llamahome.training.merged import (
    Layer,
    Merging,
    plan_merge,
    read_merged,
    write_merged,
)
from llamahome.training.publish import MERGED_FOLDER

if TYPE_CHECKING:
    from llamahome.training.engine.job import TrainingJob

_AGREES = 0.99  # of the places; rounding alone turns near ties
_PREFIX = "base_model.model."


def plan_merging(warm: WarmBase, slot: Slot) -> Merging:
    """Where the slot's adapter will be added. Raises InvalidConfig where it cannot be."""
    model = warm.model
    used: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        used.setdefault(parameter.data_ptr(), []).append(name)
    layers = []
    for name in _halves(slot):
        module = warm.site(name).module
        weight = module.get_parameter("weight")
        if len(others := used[weight.data_ptr()]) > 1:
            raise InvalidConfig(
                f"{' and '.join(others)} are one weight of the base: an adapter of one of them "
                "cannot be merged into it", field="lora.merge", remedy="Train without lora.merge",
            )  # fmt: skip
        rows, columns = weight.shape
        layers.append(Layer(name, (rows, columns), isinstance(module, Conv1D)))
    return plan_merge(Path(warm.loaded.ref.path), layers, model.base_model_prefix)


def merge(
    job: TrainingJob, merging: Merging, folder: Path
) -> Generator[list[Unit], Sequence[UnitLoss], None]:
    """Write ``folder/merged``, in a thread, and hold it against the adapter on its base.

    Nothing is written any more once this has ended, however it did: then the folder may be removed.
    Raises TrainingFailed, Stopped, OSError.
    """
    target = folder / MERGED_FOLDER
    given_up = threading.Event()
    # A thread of its own: the checkpoints of other jobs must not wait for a whole model.
    with ThreadPoolExecutor(1, thread_name_prefix="merge") as pool:
        writing = pool.submit(
            write_merged, merging, target, _halves(job.slot), job.slot.scale,
            beat=job.saver.wake, stopped=given_up.is_set,
        )  # fmt: skip
        writing.add_done_callback(lambda _: job.saver.wake())
        try:
            while not writing.done():
                job.reporter.beat()
                yield from job.stop_if_asked()
                yield []
        finally:
            given_up.set()  # and leaving the pool waits for its thread, which asks often
    writing.result()
    found = check_merge(job.warm, job.slot, job.data.training, merging, target)
    job.state.proofs["merge"] = found
    share = found["argmax_agreement"]
    job.reporter.say(
        f"Merged into the base: at {found['places']} labelled places of {found['rows']} rows the "
        f"likeliest token agrees in {share:.1%}, and the largest gap of a logit is "
        f"{found['max_logit_gap']:.3g}",
        level="info" if share >= _AGREES else "warn",
    )


def check_merge(
    warm: WarmBase, slot: Slot, rows: TokenRows, merging: Merging, target: Path
) -> JsonObject:
    """The adapter on its base against the weights in the merged files, on a few of the job's rows.

    ``argmax_agreement`` is the share of labelled places with the same likeliest token,
    ``max_logit_gap`` the largest difference of a logit there. The merged weights are read back from
    the files, one at a time, into the layers of the warm base; everything else in those files is a
    copy of the base's own.
    """
    samples = some_rows(rows)
    units = [make_unit(slot, rows, [sample], weight=1.0, learns=False) for sample in samples]
    bare = Slot.without_layers(warm.loaded.device, warm.loaded.dtype)
    adapted = torch.cat(warm.logits(units)).double()
    with _from_files(warm, merging, target) as used:
        merged = torch.cat(warm.logits([dataclasses.replace(u, slot=bare) for u in units])).double()
    if used != merging.places.keys():
        raise OperatorError(f"{len(used)} of {len(merging.places)} merged weights were checked")
    same = adapted.argmax(-1) == merged.argmax(-1)
    return {
        "rows": len(samples),
        "places": len(same),
        "argmax_agreement": float(same.double().mean()),
        "max_logit_gap": float((adapted - merged).abs().max()),
        "weights": len(merging.places),
        "dtype": ", ".join(merging.dtypes),
    }


@contextlib.contextmanager
def _from_files(warm: WarmBase, merging: Merging, target: Path) -> Iterator[set[str]]:
    """The layers' weights come from the merged files; yields the names of those that were used."""
    used: set[str] = set()

    def forward(site: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        used.add(site.shape.name)
        weight = read_merged(merging, target, site.shape.name).to(x.device, x.dtype)
        return functional.linear(x, weight, site.module.bias)

    before = {name: warm.site(name).module.forward for name in merging.places}
    try:
        for name in merging.places:
            site = warm.site(name)
            setattr(site.module, "forward", functools.partial(forward, site))  # noqa: B010
        yield used
    finally:
        for name, own in before.items():
            setattr(warm.site(name).module, "forward", own)  # noqa: B010


def _halves(slot: Slot) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's A [r, in] and B [out, r], on the CPU."""
    tensors = slot.tensors()
    names = [
        key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    ]
    return {
        name: (
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]
        )
        for name in names
    }  # fmt: skip
