"""Attention over sequences that lie side by side in one row, each seeing itself alone.

Registered with transformers under :data:`NAME`; the sequences come with the call, as
``sequence_lengths``. No mask over the whole row is ever built: in a dense one, a NaN of one
sequence times a masked zero is a NaN in all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from llamahome.training.engine.memory import is_out_of_memory

NAME = "llamahome_sequences"


def register() -> None:
    """Make :data:`NAME` known to transformers. Harmless to repeat."""
    AttentionInterface.register(NAME, attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequence_lengths: Sequence[int] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in each sequence. Query [1, heads, T, d], key and value [1, groups, T, d].

    ``sequence_lengths`` sum to at most T; beyond them are zeros. Returns [1, T, heads, d].
    Raises NotImplementedError for what this does not do (soft caps, sinks, given masks), so that
    such a base is found out when it is loaded.
    """
    if sequence_lengths is None:
        raise NotImplementedError("no sequence_lengths came with the call")
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None
    ]
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask'}")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _varlen_is_there():
        packed = _varlen(query, key, value, scaling, sliding_window, sequence_lengths)
        if packed is not None:
            return packed, None
    return _one_by_one(query, key, value, scaling, sliding_window, sequence_lengths), None


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    lengths: Sequence[int],
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    rest = query.shape[2] - sum(lengths)
    cuts = [*lengths, rest] if rest else list(lengths)
    outputs = []
    # One split and one concatenation: the backward of a slice would fill a whole row with zeros.
    parts = zip(*(torch.split(each, cuts, 2) for each in (query, key, value)), strict=True)
    for index, (q, k, v) in enumerate(parts):
        if index == len(lengths):
            outputs.append(torch.zeros_like(q))
            continue
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        length = q.shape[2]
        near = window is not None and length > window
        outputs.append(
            functional.scaled_dot_product_attention(
                q,
                k,
                v,
                scale=scaling,
                is_causal=not near,
                attn_mask=_band(length, window, q.device) if near and window else None,
            )  # fmt: skip
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token sees another: itself and the ``window - 1`` before it."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def _varlen_is_there() -> bool:
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return not torch.are_deterministic_algorithms_enabled()  # its backward adds up with atomics


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    lengths: Sequence[int],
) -> torch.Tensor | None:
    """One kernel for all sequences, or None where this device has none for these shapes."""
    from torch.nn.attention.varlen import varlen_attn

    total = sum(lengths)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    longest = max(lengths)
    q, k, v = (each[0, :, :total].transpose(0, 1).contiguous() for each in (query, key, value))
    try:
        out = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    except (NotImplementedError, RuntimeError) as error:
        # A kernel that is not there for a head size or a device says so in one of these two; memory
        # and a broken context are other matters. The caller's way gives the same numbers.
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        return None
    assert isinstance(out, torch.Tensor)
    rest = query.shape[2] - total
    padded = functional.pad(out, (0, 0, 0, 0, 0, rest)) if rest else out
    return padded.unsqueeze(0)
