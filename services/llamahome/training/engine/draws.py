"""Random numbers as functions of counters: nothing has a state, so nothing needs saving.

Dropout of one layer in one micro-batch depends on (seed, step, micro-batch, layer) and on the place
in the micro-batch, never on what else is in the pass, on recomputation or on the number of jobs.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch

_LEVELS = 65_536  # a draw is 16 bits of a 64-bit word
_PER_WORD = 4


class DropKey(NamedTuple):
    """Whose draws: a job's seed, its optimizer step (from 0) and the micro-batch in its window."""

    seed: int
    step: int
    micro_batch: int


class Dropout(NamedTuple):
    """A drop probability in 1/65,536ths, and what the kept values are divided by."""

    level: int
    keep: float

    @classmethod
    def of(cls, probability: float) -> Dropout:
        """The nearest level below 1; ``keep`` is the exact share of what is kept at that level."""
        level = min(round(probability * _LEVELS), _LEVELS - 1)
        return cls(level, 1.0 - level / _LEVELS)


def key_of(key: DropKey, site: str) -> int:
    """128 bits that name one layer's draws in one micro-batch."""
    text = f"llamahome dropout/{key.seed}/{key.step}/{key.micro_batch}/{site}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def keep_mask(
    key: DropKey, site: str, rows: range, of: int, columns: int, dropout: Dropout,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """True where a value is kept: bool [len(rows), columns].

    ``rows`` are places in the job's own micro-batch, which has ``of``. The numbers are
    Philox4x64's (Salmon et al. 2011), four draws a word, a row beginning with a word of its own; on
    CUDA torch's Philox (:func:`torch_mask`): other numbers, the same independence.
    """
    if device.type == "cuda":
        generator = torch.Generator(device).manual_seed(key_of(key, site) & (2**63 - 1))
        return torch_mask(generator, rows, of, columns, dropout)
    words = math.ceil(columns / _PER_WORD)
    raw = np.random.Philox(key=key_of(key, site)).random_raw(rows.stop * words)
    draws = raw.view(np.uint16).reshape(rows.stop, words * _PER_WORD)
    return torch.from_numpy(draws[rows.start :, :columns] >= dropout.level)


def torch_mask(
    generator: torch.Generator, rows: range, of: int, columns: int, dropout: Dropout
) -> torch.Tensor:
    """Always drawn for the whole micro-batch: on CUDA a draw's place in the stream depends on the
    size of the whole, so a part drawn by itself would drop others."""
    full = torch.empty(of, columns, dtype=torch.bool, device=generator.device)
    return full.bernoulli_(dropout.keep, generator=generator)[rows.start : rows.stop]


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``x`` where ``mask`` is True, else zero (NaN where x is); in neither case x itself.

    numpy multiplies floats by bools four times as fast on a CPU as torch does, to the same bits.
    """
    if x.is_cuda or x.dtype is torch.bfloat16:
        return x * mask
    return torch.from_numpy(x.detach().numpy() * mask.numpy())


def start_values(seed: int, site: str, rank: int, columns: int) -> torch.Tensor:
    """LoRA's A at the start, fp32 [rank, columns] on the CPU: uniform in +-1/sqrt(columns).

    That is Kaiming's bound with a = sqrt(5) (He et al. 2015), which PEFT uses; B starts at zero.
    """
    text = f"llamahome start/{seed}/{site}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    uniform = generator.random((rank, columns), dtype=np.float32)
    return torch.from_numpy((uniform * 2.0 - 1.0) * np.float32(1.0 / math.sqrt(columns)))
