"""The machine as torch sees it: device, precision, threads, determinism, and its fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Iterator
from typing import Literal

import torch
import transformers

from llamahome.config import TrainingConfig
from llamahome.errors import InvalidConfig
from llamahome.schemas import JsonObject


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where to run, as the process's settings say it. ``threads`` 0 is every core allowed.

    ``memory_bytes`` limits what activations may take (None: what the device has free), and
    ``tick_tokens`` the tokens of a pass (0: as the device and the base suggest).
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    memory_bytes: int | None = None
    tick_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a job really runs. ``note`` is set where that is not what its config asks for."""

    device: torch.device
    precision: Literal["fp64", "fp32", "bf16"]  # fp64 is for checking the arithmetic alone
    threads: int
    deterministic: bool
    note: str | None = None
    note_level: Literal["info", "warn"] = "info"
    memory_bytes: int | None = None
    tick_tokens: int = 0

    @property
    def base_dtype(self) -> torch.dtype:
        """The frozen base's; adapters, moments and the loss are never narrower than fp32."""
        return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[
            self.precision
        ]


def choose_machine(runtime: Runtime, config: TrainingConfig, threads: int | None = None) -> Machine:
    """Device and precision for a job; ``threads`` (a checkpoint's) beats the runtime's.

    Raises InvalidConfig where CUDA is asked for and is not there.
    """
    cuda = torch.cuda.is_available() if runtime.device != "cpu" else False
    if runtime.device == "cuda" and not cuda:
        raise InvalidConfig(
            "cuda is asked for, but torch finds no CUDA device", field="LLAMAHOME_DEVICE",
            remedy="Use auto or cpu",
        )  # fmt: skip
    precision: Literal["fp32", "bf16"] = "fp32"
    note = None
    if config.fp16 and not cuda:
        note = "fp16 is not available on a CPU: training in fp32"
    elif config.fp16 and not torch.cuda.is_bf16_supported():
        note = "This GPU has no bf16: training in fp32"
    elif config.fp16:
        precision = "bf16"
        note = "bf16 is used in place of fp16: it needs no loss scaling"
    return Machine(
        device=torch.device("cuda" if cuda else "cpu"),
        precision=precision,
        threads=threads or runtime.threads or len(os.sched_getaffinity(0)),
        # Deterministic kernels cost next to nothing on a CPU, and resume counts on them there.
        deterministic=config.mode == "exact" or not cuda,
        note=note,
        note_level="warn" if precision == "fp32" else "info",
        memory_bytes=runtime.memory_bytes,
        tick_tokens=runtime.tick_tokens,
    )


@contextlib.contextmanager
def configured(machine: Machine) -> Iterator[None]:
    """Torch's process-wide switches set for a job, and put back after it."""
    cuda = machine.device.type == "cuda"
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    try:
        torch.set_num_threads(machine.threads)
        torch.use_deterministic_algorithms(machine.deterministic)
        if cuda and machine.deterministic:
            # Their backward passes add up with atomics, in no fixed order.
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)


def fingerprint(machine: Machine, config: TrainingConfig) -> JsonObject:
    """What bit equality depends on beside the inputs; two equal ones give equal bytes on a CPU."""
    cuda = machine.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "threads": machine.threads,
        "precision": machine.precision,
        "mode": config.mode,
        "deterministic": machine.deterministic,
    }
