"""What must hold on a device before its speed is worth a number, on a small base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from warm_jobs import Bench, Watched, distance, file_bytes, machine, make_loaded, weights

from llamahome.errors import TrainingFailed

# fp32 on CUDA: the order of sums changes with the number of rows, and AdamW makes steps of equal
# size out of gradients of any; a wrong mask, weight or neighbour is far beyond this.
_CLOSE = 1e-2
_CLOSE_LOSS = 1e-4
_MIXED: list[dict[str, Any]] = [
    {"seed": 1, "batch_size": 2, "lora": {"r": 8}},
    {"seed": 2, "batch_size": 1, "gradient_accumulation_steps": 3,
     "lora": {"r": 16, "dropout": 0.3}},
    {"seed": 3, "batch_size": 4, "lora": {"r": 32, "dropout": 0.0, "use_rslora": True}},
]  # fmt: skip
Found = dict[str, Any]


def _bench(folder: Path, device: str, precision: str, *, exact: bool = False) -> Bench:
    chosen = machine(device, precision, exact=exact)
    return Bench(make_loaded("small", chosen)[0], chosen, folder)


def together_is_alone(folder: Path, device: str) -> Found:
    """fp32: three jobs of mixed ranks, batches and dropout, against each alone."""
    bench = _bench(folder, device, "fp32")
    jobs = [(bench.data(8, 48, seed, shortest=8), one) for seed, one in enumerate(_MIXED)]
    together = bench.run(jobs)
    alone = [bench.run([job])[0] for job in jobs]
    gaps = [distance(a, b) for a, b in zip(alone, together, strict=True)]
    losses = [_loss_gap(a, b) for a, b in zip(alone, together, strict=True)]
    return {
        "passed": max(gaps) <= _CLOSE and max(losses) <= _CLOSE_LOSS,
        "weights": max(gaps), "losses": max(losses),
    }  # fmt: skip


def _loss_gap(one: Watched, other: Watched) -> float:
    """The largest relative difference of any step's loss."""
    assert one.losses.keys() == other.losses.keys()
    return max(abs(a - (other.losses[step] or 0)) / a for step, a in one.losses.items() if a)


def bf16_is_within_the_seeds(folder: Path, device: str) -> Found:
    """bf16: beside others, a job's last loss is as near to its own alone as another seed's is."""
    bench = _bench(folder, device, "bf16")
    data = bench.data(4, 48, 0, shortest=8)  # one step an epoch: the order of rows decides nothing
    jobs = [
        (data, {"seed": seed, "batch_size": 4, "epochs": 8, "learning_rate": 5e-3,
                "lora": {"dropout": 0.1}})
        for seed in (1, 2, 3)
    ]  # fmt: skip
    together = bench.run(jobs)
    alone = [bench.run([job])[0] for job in jobs]
    last = [_last(one) for one in alone]
    gap = max(abs(_last(one) - mine) for one, mine in zip(together, last, strict=True))
    spread = max(last) - min(last)
    apart = max(distance(a, b) for a, b in zip(alone, together, strict=True))
    return {"passed": gap <= spread, "gap": gap, "spread": spread, "weights": apart}


def _last(job: Watched) -> float:
    weights(job)  # raises where the job failed
    loss = job.losses[max(job.losses)]
    return math.nan if loss is None else loss


def a_poisoned_job_fails_alone(folder: Path, device: str, precision: str = "bf16") -> Found:
    """One job of three full of NaN: it fails, and the others end finite."""
    others, poisoned = _with_poison(_bench(folder, device, precision))
    finite = all(bool(weights(one).isfinite().all()) for one in others)
    failed = isinstance(poisoned.outcome, TrainingFailed)
    return {"passed": finite and failed, "others_finite": finite, "failed": failed}


def exact_repeats_itself(folder: Path, device: str, precision: str = "bf16") -> Found:
    """mode: exact, with a poisoned neighbour: the same bytes from one run to the next."""
    bench = _bench(folder, device, precision, exact=True)
    first, second = (_with_poison(bench)[0] for _ in range(2))
    equal = [file_bytes(a) == file_bytes(b) for a, b in zip(first, second, strict=True)]
    return {"passed": all(equal), "equal": sum(equal), "of": len(equal)}


def _with_poison(bench: Bench) -> tuple[list[Watched], Watched]:
    jobs = [
        (bench.data(8, 48, seed, shortest=8), {"seed": seed, "batch_size": 2, "epochs": 2})
        for seed in (1, 2, 3)
    ]

    def poison(engine: Any) -> None:
        slot = engine.slots()[1]
        with torch.no_grad():
            slot.weights.fill_(math.nan)
        slot.refresh()

    first, poisoned, last = bench.run_disturbed(jobs, poison)
    return [first, last], poisoned


CHECKS = {
    "fp32: together as alone": together_is_alone,
    "bf16: the gap to alone is within the seeds'": bf16_is_within_the_seeds,
    "a poisoned job fails alone": a_poisoned_job_fails_alone,
    "exact: bitwise equal from run to run": exact_repeats_itself,
}


def check_all(folder: Path, device: str) -> dict[str, Found]:
    return {
        name: check(folder / str(number), device)
        for number, (name, check) in enumerate(CHECKS.items())
    }
