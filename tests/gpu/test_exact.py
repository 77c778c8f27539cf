"""What must hold on a GPU: the checks that benchmarks/gpu.py makes before it measures.

The same checks run on a CPU in the full dose, so that they are known to work where no GPU is.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_NAMES = [
    "together_is_alone", "bf16_is_within_the_seeds", "a_poisoned_job_fails_alone",
    "exact_repeats_itself",
]  # fmt: skip


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    # cuBLAS repeats itself in a fixed workspace only; it reads this when it starts.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return importlib.import_module("gpu_exact")


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.parametrize("name", _NAMES)
def test_on_a_gpu(name: str, checks: Any, tmp_path: Path) -> None:
    """BEHAVIOUR 69: bf16 on a GPU is within what seeds differ by; and the other checks."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    found = getattr(checks, name)(tmp_path, "cuda")

    assert found["passed"], found


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("name", _NAMES)
def test_the_same_on_a_cpu(name: str, checks: Any, tmp_path: Path) -> None:
    found = getattr(checks, name)(tmp_path, "cpu")

    assert found["passed"], found


@pytest.mark.model
@pytest.mark.long
def test_a_neighbour_that_mattered_would_be_seen(
    checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.training.engine import attention

    # Every row sees the rows before it, of whichever job: the fault that packing must not have.
    sound = attention.attend

    def leaking(*tensors: Any, sequence_lengths: Any = None, **others: Any) -> Any:
        return sound(*tensors, sequence_lengths=[sum(sequence_lengths)], **others)

    monkeypatch.setattr(attention, "attend", leaking)
    monkeypatch.setattr("llamahome.training.engine.warm.WarmBase._try_packed", _packed_anyway)

    assert not checks.together_is_alone(tmp_path, "cpu")["passed"]


def _packed_anyway(warm: Any) -> None:
    """Without the look at a few sequences that would find the fault out at loading."""
    from llamahome.training.engine import attention

    attention.register()
    warm.model.set_attn_implementation(attention.NAME)
