"""How fast and how large a run is: what the clock and the machine decide, not its inputs."""

from __future__ import annotations

import dataclasses
import re
import resource
import weakref
from typing import Any, Self

import torch

from llamahome.schemas import JsonObject
from llamahome.training.runtime import Machine

# Dense bf16 peaks in FLOP/s with fp32 accumulation, from NVIDIA's data sheets (where those name the
# sparse figure, half of it); the first name that matches counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250e12),
    (r"GH200|H200", 989.4e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H100", 989.4e12),
    (r"A100", 312e12),
    (r"L40S", 362.05e12),
    (r"L40", 181.05e12),
    (r"L4", 121e12),
    (r"A10G", 70e12),
    (r"A10", 125e12),
    (r"A30", 165e12),
    (r"A40", 149.7e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
)


@dataclasses.dataclass(frozen=True)
class Gauges:
    """One run's instruments.

    ``flops_per_token`` counts what the model needs, not what recomputation adds (the *model* FLOPs
    of Chowdhery et al. 2022, appendix B): 2 N forward and 2 N backward to the inputs, for the base
    of N weights is frozen and has no weight gradients; 6 for each weight of the adapter. N is
    without the embedding table unless that is the output head too (Kaplan et al. 2020). Attention
    scores are left out, so at long rows it is a little low.
    """

    flops_per_token: float
    peak_flops: float | None
    memory: PeakReader

    @classmethod
    def of(cls, model: Any, adapter_parameters: int, machine: Machine, memory: PeakReader) -> Self:
        total = sum(parameter.numel() for parameter in model.parameters())  # each tied one once
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        if head is None or head.weight is not table:
            total -= table.numel()
        peak = None
        if machine.device.type == "cuda" and machine.precision == "bf16":
            peak = peak_flops(torch.cuda.get_device_name(machine.device))
        return cls(4.0 * total + 6.0 * adapter_parameters, peak, memory)

    def read(self, tokens: int, seconds: float) -> JsonObject:
        """After a step that took ``tokens`` through the model in ``seconds``.

        ``mfu`` (0..1) is this run's own share of the device, which it may have had to share; it is
        there where the device's peak is known.
        """
        speed = tokens / max(seconds, 1e-9)
        read: JsonObject = {
            "tokens_per_second": round(speed, 1),
            "peak_memory_bytes": self.memory.read(),
        }
        if self.peak_flops is not None:
            read["mfu"] = round(speed * self.flops_per_token / self.peak_flops, 4)
        return read


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bf16 of a GPU by its name, as torch tells it; None for one not in the table."""
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![0-9A-Z])(?:{pattern})(?![0-9A-Za-z])", device_name):
            return peak
    return None


class PeakMemory:
    """The most that this process held on its device, for any number of readers.

    torch keeps one peak, which a pass sets back to find its own: it is taken down here before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readers: weakref.WeakSet[PeakReader] = weakref.WeakSet()

    def reader(self) -> PeakReader:
        reader = PeakReader(self)
        self._readers.add(reader)
        return reader

    def take(self) -> None:
        """Take down the peak since the last call, and begin another. Off CUDA it cannot be set
        back, and is the most that ever was resident (getrusage(2), in KiB)."""
        if self._device.type == "cuda":
            most = int(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for reader in self._readers:
            reader.most = max(reader.most, most)


class PeakReader:
    """One who wants to know the peak since it last asked."""

    def __init__(self, peak: PeakMemory) -> None:
        self._peak, self.most = peak, 0

    def read(self) -> int:
        """In bytes, since the last call."""
        self._peak.take()
        most, self.most = self.most, 0
        return most
