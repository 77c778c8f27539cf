"""The training benchmark end to end, on a base too small for its figures to mean anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
_MISSING = [name for name in ("datasets", "trl") if importlib.util.find_spec(name) is None]


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)} missing: make install-bench")
def test_the_json_has_the_ratios_and_the_losses_of_everyone() -> None:
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), "--quick", "--size", "tiny", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    found = json.loads(line)

    for key in ("ratio_vs_hf", "ratio_vs_trl_packing", "ratio_k8_vs_fresh_processes"):
        assert found[key] > 0, key
    assert set(found["table"]) == {"ours", "hf", "trl_packing"}
    for name, one in found["table"].items():
        assert one["held_out_loss"] < one["held_out_loss_before"], name
        assert one["tokens_per_cpu_second"] > 0, name
        assert one["peak_mb"] > 0, name
    before = {one["held_out_loss_before"] for one in found["table"].values()}
    assert len(before) == 1, "not all had the same base and rows"


@pytest.mark.skipif(not _MISSING, reason="the peers are installed")
def test_without_the_peers_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, str(_SCRIPT)], capture_output=True, text=True)

    assert done.returncode == 2
    assert "make install-bench" in done.stderr
