"""The engine on one GPU against plain transformers + peft: exactness first, then speed.

    python benchmarks/gpu.py [--device cuda|cpu] [--size full|tiny] [--minutes M] [--json]

Bases are random weights in Llama-3's 8B and 1B shapes, made on the device. A cell is so many jobs
of so many rows a step; ours packs them on one warm engine, the peer is a plain loop (forward with
labels, backward, clip, fused AdamW on peft's adapter) that has one job at a time. Both are measured
over a short window of steps after a warm-up, start and end of jobs excluded; those are measured
apart. MFU counts 4 FLOPs a token and weight (forward, and backward without dW), the embeddings' and
attention's not. `--device cpu --size tiny` runs the same code in seconds; its speeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_measures import Cell, first_steps, last_steps, ours, peer, tiered

CELLS = {
    "full": [Cell("8B", 8, 1, 128), Cell("8B", 8, 1, 512), Cell("8B", 1, 4, 2048),
             Cell("1B", 8, 1, 128)],
    "tiny": [Cell("tiny", 8, 1, 16), Cell("tiny", 8, 1, 64), Cell("tiny", 1, 4, 128)],
}  # fmt: skip
MANY = {"full": Cell("8B", 64, 1, 256), "tiny": Cell("tiny", 4, 1, 32)}
MANY_STEPS = 300


class Clock:
    """The minutes of the whole run: what does not fit any more is left out, and said so."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def run(self, title: str, needs_seconds: float, work: Callable[[], Any]) -> Any:
        if time.monotonic() + needs_seconds > self._end:
            self.left_out.append(title)
            return None
        print(f"  {title}", file=sys.stderr, flush=True)
        return work()


def many(found: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Minutes for all jobs of ``cell`` with MANY_STEPS steps each, from what was measured."""
    training = cell.jobs * cell.step_tokens * MANY_STEPS / found["many"]["tokens_per_second"]
    ends = cell.jobs * found["last_steps"]["seconds"]
    admitted = cell.jobs * found["many"]["admit_seconds"]
    minutes = {"training": training / 60, "admitting": admitted / 60, "ending": ends / 60}
    return {**minutes, "all": sum(minutes.values())}


def measure(size: str, device: str, minutes: float, folder: Path) -> dict[str, Any]:
    from gpu_exact import check_all
    from warm_jobs import Bench, machine, make_loaded

    clock = Clock(minutes)
    found: dict[str, Any] = {"exact": clock.run("exactness", 0, lambda: check_all(folder, device))}
    seconds = 8.0 if size == "full" else 0.1
    long = 30 if size == "full" else 0
    found["cells"] = {}
    for name in dict.fromkeys(cell.base for cell in CELLS[size]):
        fast = machine(device, "bf16")
        loaded, checksum_seconds = make_loaded(name, fast)
        found[f"checksum_seconds_{name}"] = checksum_seconds
        bench = Bench(loaded, fast, folder / name)
        cells = [cell for cell in CELLS[size] if cell.base == name]
        for cell in cells:
            found["cells"][cell.title] = {
                who.__name__: clock.run(
                    f"{cell.title}: {who.__name__}", long, partial(who, bench, cell, seconds)
                )
                for who in (ours, peer)
            }
        if name == MANY[size].base:
            _extras(found, clock, bench, cells, MANY[size], seconds, long)
        del bench, loaded
        _empty_cache(device)
    return found | {"left_out": clock.left_out}


def _extras(
    found: dict[str, Any], clock: Clock, bench: Any, cells: list[Cell], crowd: Cell,
    seconds: float, long: float,
) -> None:  # fmt: skip
    from warm_jobs import Bench, machine

    small, middle = cells[0], cells[1]
    exact = Bench(
        bench.loaded, machine(str(bench.loaded.device), "bf16", exact=True), bench.folder / "exact"
    )
    found["first_steps"] = clock.run(
        "first steps", long, lambda: first_steps(bench, small, 10 if long else 3)
    )
    found["last_steps"] = clock.run("last steps", long, lambda: last_steps(bench, small))
    found["tiers"] = {
        f"{cell.title}, {tier}": clock.run(
            f"{cell.title}, {tier}", long, lambda c=cell, t=tier: tiered(bench, c, seconds, t)
        )
        for cell in (small, middle) for tier in ("loop", "grouped")
    }  # fmt: skip
    found["exact_mode"] = clock.run(
        f"{middle.title}, exact", long, lambda: ours(exact, middle, seconds)
    )
    found["many"] = clock.run(crowd.title, 3 * long, lambda: ours(bench, crowd, seconds))
    if found["many"] and found["last_steps"]:
        found["many_minutes"] = many(found, crowd)


def _empty_cache(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(CELLS), default="full")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    # cuBLAS repeats itself in a fixed workspace only; it reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from gpu_table import show

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here: nothing measured (--device cpu --size tiny runs)")
        return 0
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked.size, asked.device, asked.minutes, Path(folder))
    found |= {"device": name, "torch": torch.__version__, "size": asked.size}
    if asked.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if all(one["passed"] for one in found["exact"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
