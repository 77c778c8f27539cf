"""What gpu.py measures: windows of steps, ours and the peer's, and the start and end of a job.

Torch is imported where it is used: gpu.py sets what it reads from the environment first.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16, dense; the makers' figures
_WARMUP_STEPS = 3
_STEPS = 1_000_000  # more than any window takes
_ROWS = 16  # of data a job has; it goes round them


@dataclasses.dataclass(frozen=True)
class Cell:
    """``jobs`` of ``rows`` rows of ``length`` tokens a step each."""

    base: str
    jobs: int
    rows: int
    length: int

    @property
    def title(self) -> str:
        return f"{self.base}, {self.jobs} x ({self.rows} x {self.length})"

    @property
    def step_tokens(self) -> int:
        return self.rows * self.length


def _window(bench: Any, seconds: float, step: Callable[[], None], steps: Callable[[], int]) -> Any:
    """(steps taken, seconds) of a window of at least so many seconds, and two calls of ``step``."""
    from warm_jobs import settle

    settle(bench.loaded.device)
    first, begin, calls = steps(), time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - begin < seconds:
        step()
        calls += 1
        # The engine waits for each pass's losses anyway; the peer is held to the same.
        settle(bench.loaded.device)
    return steps() - first, time.perf_counter() - begin


def ours(bench: Any, cell: Cell, seconds: float, tier: str = "auto") -> dict[str, Any]:
    from warm_jobs import cancel

    engine = bench.engine(tier)
    begin = time.perf_counter()
    jobs = []
    try:
        for number in range(cell.jobs):
            data = bench.data(_ROWS * cell.rows, cell.length, number)
            jobs.append(bench.admit(
                engine, data, batch_size=cell.rows, epochs=_STEPS, seed=number,
                logging={"steps": _STEPS},
            ))  # fmt: skip
        admitted = (time.perf_counter() - begin) / cell.jobs
        while min(job.done for job in jobs) < _WARMUP_STEPS:
            engine.tick(wait=True)
            _raise_if_ended(jobs)
        _reset_peak(bench)
        steps, took = _window(
            bench, seconds, lambda: engine.tick(wait=True), lambda: sum(job.done for job in jobs)
        )
        _raise_if_ended(jobs)
        cancel(engine, jobs)
    finally:
        engine.close()
    return _figures(bench, cell, steps, took) | {"admit_seconds": admitted}


def _raise_if_ended(jobs: list[Any]) -> None:
    for job in jobs:
        if isinstance(job.outcome, Exception):
            raise job.outcome


def peer(bench: Any, cell: Cell, seconds: float) -> dict[str, Any]:
    """Plain transformers + peft on the same weights: one job, as the others would only wait."""
    import torch
    from peft import LoraConfig, get_peft_model

    device = bench.loaded.device
    begin = time.perf_counter()
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05,
                      target_modules="all-linear")  # fmt: skip
    model: Any = get_peft_model(bench.loaded.model, lora)
    injected = time.perf_counter() - begin
    model.train()
    learning = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, fused=True)
    ids = torch.randint(bench.loaded.vocabulary, (cell.rows, cell.length), device=device)
    labels = ids.clone()
    labels[:, : cell.length // 2] = -100
    done = 0

    def step() -> None:
        nonlocal done
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

    try:
        for _ in range(_WARMUP_STEPS):
            step()
        _reset_peak(bench)
        steps, took = _window(bench, seconds, step, lambda: done)
    finally:
        model.unload()
        bench.loaded.model.requires_grad_(False)
        bench.loaded.model.eval()
    return _figures(bench, cell, steps, took) | {"inject_seconds": injected}


def _reset_peak(bench: Any) -> None:
    import torch

    if bench.loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _figures(bench: Any, cell: Cell, steps: int, seconds: float) -> dict[str, Any]:
    import torch

    speed = steps * cell.step_tokens / seconds
    cuda = bench.loaded.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)
    model = bench.loaded.model
    weights = sum(one.numel() for one in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    return {
        "tokens_per_second": speed,
        "mfu": speed * 4 * weights / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "steps": steps, "seconds": seconds,
    }  # fmt: skip


def first_steps(bench: Any, cell: Cell, times: int) -> dict[str, Any]:
    """From admission on an idle warm engine to the end of the job's first optimizer step."""
    from warm_jobs import cancel, settle

    engine, found = bench.engine(), []
    try:
        for number in range(times + 1):
            data = bench.data(_ROWS, cell.length, number)
            settle(bench.loaded.device)
            begin = time.perf_counter()
            job = bench.admit(engine, data, epochs=_STEPS, seed=number)
            while job.done < 1:
                engine.tick(wait=True)
                _raise_if_ended([job])
            settle(bench.loaded.device)
            found.append(time.perf_counter() - begin)
            cancel(engine, [job])
    finally:
        engine.close()
    warm = sorted(found[1:])
    return {
        "p50_seconds": statistics.median(warm), "p95_seconds": warm[int(0.95 * (len(warm) - 1))],
        "very_first_seconds": found[0], "times": times,
    }  # fmt: skip


def last_steps(bench: Any, cell: Cell) -> dict[str, Any]:
    """From a job's last optimizer step to its adapter: during that the engine does nothing else."""
    engine = bench.engine()
    try:
        job = bench.admit(engine, bench.data(2, cell.length), epochs=1)
        stepped = time.perf_counter()
        while job.outcome is None:
            done = job.done
            begin = time.perf_counter()
            engine.tick(wait=True)
            if done < 2:
                stepped = begin
        _raise_if_ended([job])
    finally:
        engine.close()
    # The last tick holds the second step too: some milliseconds of it.
    return {"seconds": time.perf_counter() - stepped}


def tiered(bench: Any, cell: Cell, seconds: float, tier: str) -> dict[str, Any]:
    """A tier by name; what this device cannot do of it is an answer too."""
    try:
        return ours(bench, cell, seconds, tier)
    except (RuntimeError, NotImplementedError) as error:
        return {"not_here": str(error).splitlines()[0]}
