"""The GPU benchmark, run on a CPU: what it measures there means nothing, that it runs does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.model
def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = _run()

    assert done.returncode == 0
    assert "no CUDA device" in done.stdout


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(900)
def test_it_checks_exactness_and_measures_every_cell() -> None:
    done = _run("--device", "cpu", "--size", "tiny", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert all(one["passed"] for one in found["exact"].values())
    assert len(found["exact"]) == 4
    assert found["left_out"] == []
    for title, cell in found["cells"].items():
        assert cell["ours"]["tokens_per_second"] > 0, title
        assert cell["peer"]["tokens_per_second"] > 0, title
    assert found["many_minutes"]["all"] > 0
    assert found["first_steps"]["p50_seconds"] > 0
