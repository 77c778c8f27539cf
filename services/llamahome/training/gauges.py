"""How fast and how large a run is: what the clock and the machine decide, not its inputs."""

from __future__ import annotations

import dataclasses
import re
import resource
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
    device: torch.device

    @classmethod
    def of(cls, model: Any, adapter_parameters: int, machine: Machine) -> Self:
        total = sum(parameter.numel() for parameter in model.parameters())  # each tied one once
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        if head is None or head.weight is not table:
            total -= table.numel()
        peak = None
        if machine.device.type == "cuda" and machine.precision == "bf16":
            peak = peak_flops(torch.cuda.get_device_name(machine.device))
        return cls(4.0 * total + 6.0 * adapter_parameters, peak, machine.device)

    def read(self, tokens: int, seconds: float) -> JsonObject:
        """After a step that took ``tokens`` through the model in ``seconds``.

        ``mfu`` (0..1) is this run's own share of the device, which it may have had to share; it is
        there where the device's peak is known.
        """
        speed = tokens / max(seconds, 1e-9)
        read: JsonObject = {
            "tokens_per_second": round(speed, 1),
            "peak_memory_bytes": peak_memory_bytes(self.device),
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


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process ever held: on the GPU, or else resident (getrusage(2), in KiB)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
