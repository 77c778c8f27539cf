"""LoRA training against transformers.Trainer + peft and TRL's SFTTrainer, in one run, one thread.

    python benchmarks/training.py [--size S] [--rows N] [--repeats N] [--quick] [--json]

Every contender gets the same ids and labels in the same order (generated conversations through our
own preprocessing), the same base, LoRA on all linear layers and AdamW in fp32, and runs in a fresh
process. Its speed is the tokens of the data, padding not counted, over the CPU seconds of train()
alone; ours includes its self-checks and writing the adapter, the peers write nothing. Losses are of
rows that nobody trained on, before and after. What each peer does: peers.py.

Then K small jobs on one warm engine, against the same jobs one after another in fresh processes of
Trainer + peft, which are charged whole: starting, imports, loading, training. The engine is charged
with loading the base and training ("warm"), and with starting its process too ("cold"). Peers:
`make install-bench`. With --quick the self-checks, a fixed cost of each job, weigh more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generated import make_data
from peers import Result, hf, ours, together, trl
from prepared import (
    HELD_OUT,
    SIZES,
    VOCABULARY,
    make_base,
    tokenise,
    write_job,
    write_rows,
)

_NAMES = {
    "ours": "llamahome",
    "hf": "Trainer + peft",
    "trl_padded": "TRL SFTTrainer, padded",
    "trl_packing": "TRL SFTTrainer, packing",
}
_BATCH = 4
_MAX_LENGTH = 512
_SHORT = 128  # tokens of a small job's row
_JOBS = 8
_JOB_STEPS = 12


def child(name: str, folder: Path, jobs: list[Path]) -> Result:
    """Run one contender once."""
    contenders: dict[str, Callable[[], Result]] = {
        "ours": lambda: ours(folder, jobs[0]),
        "hf": lambda: hf(folder, jobs[0]),
        "trl_padded": lambda: trl(folder, jobs[0], packing=False, packed_length=_MAX_LENGTH),
        "trl_packing": lambda: trl(folder, jobs[0], packing=True, packed_length=_MAX_LENGTH),
        "together": lambda: together(folder, jobs, at_once=True),
        "one_by_one": lambda: together(folder, jobs, at_once=False),
    }
    return contenders[name]()


def measure(name: str, folder: Path, jobs: list[Path]) -> Result:
    """One contender in a fresh process, on copies of the jobs that nobody has used."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        copies = []
        for job in jobs:
            copy = Path(fresh) / job.name
            copy.mkdir()
            for file in job.iterdir():
                (copy / file.name).symlink_to(file)
            copies.append(str(copy))
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, "--folder", str(folder), *copies],
            env=environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def one_job(
    names: list[str], folder: Path, tokens: Any, rows: int, repeats: int
) -> dict[str, Result]:
    """Everyone named on one job, turn by turn; each one's least CPU seconds count."""
    samples = list(range(HELD_OUT, HELD_OUT + rows))
    write_rows(folder / "held_out.json", tokens, range(HELD_OUT))
    write_job(folder / "job", tokens, samples, _BATCH, seed=42)
    count = int(tokens.lengths[samples].sum())
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, mine in runs.items():
            mine.append(measure(name, folder, [folder / "job"]))
    table = {}
    for name, mine in runs.items():
        best = min(mine, key=lambda one: float(one["cpu_seconds"]))
        table[name] = best | {"tokens_per_cpu_second": count / best["cpu_seconds"]}
    return table


def many_jobs(folder: Path, tokens: Any, batch: int, *, quick: bool) -> dict[str, Any]:
    """K small jobs: on a warm engine together, there in turn, and in fresh processes."""
    rows = batch * _JOB_STEPS
    jobs, sizes = [], []
    for number in range(_JOBS):
        samples = list(range(number * rows, (number + 1) * rows))
        jobs.append(folder / "small" / str(number))
        write_job(jobs[-1], tokens, samples, batch, seed=number)
        sizes.append(int(tokens.lengths[samples].sum()))
    fresh = [measure("hf", folder, [job]) for job in jobs[: 2 if quick else _JOBS]]
    table = {
        str(count): _row(folder, jobs[:count], fresh, in_turn=count > 1 and not quick)
        | {"tokens": sum(sizes[:count])}
        for count in ([_JOBS] if quick else [1, 4, _JOBS])
    }
    return {
        "batch": batch, "steps": _JOB_STEPS, "rows_up_to": _SHORT,
        "fresh_processes_measured": len(fresh), "by_count": table,
    }  # fmt: skip


def _row(folder: Path, jobs: list[Path], fresh: list[Result], *, in_turn: bool) -> dict[str, Any]:
    """Fewer fresh processes than jobs stand for all of them: their mean counts."""
    count = len(jobs)
    at_once = measure("together", folder, jobs)
    mine = fresh[:count]
    theirs = {
        key: count * sum(one[key] for one in mine) / len(mine)
        for key in ("process_seconds", "cpu_seconds")
    }
    row: dict[str, Any] = {
        "together": at_once,
        "one_by_one": measure("one_by_one", folder, jobs) if in_turn else None,
        "fresh_processes": theirs | {"peak_mb": max(one["peak_mb"] for one in mine)},
    }
    warm = at_once["load_seconds"] + at_once["cpu_seconds"]
    row["ratio_vs_fresh_processes"] = theirs["process_seconds"] / warm
    row["ratio_cold_vs_fresh_processes"] = theirs["process_seconds"] / at_once["process_seconds"]
    if row["one_by_one"]:
        row["ratio_vs_one_by_one"] = row["one_by_one"]["cpu_seconds"] / at_once["cpu_seconds"]
    return row


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, many = Path(name), Path(name) / "many"
        needed = max(HELD_OUT + asked.rows, _JOBS * _JOB_STEPS * asked.job_batch)
        make_data(folder, needed + needed // 4 + 8, vocabulary=VOCABULARY)
        make_base(folder, SIZES[asked.size])
        names = [name for name in _NAMES if not (asked.quick and name == "trl_padded")]
        table = one_job(names, folder, tokenise(folder, _MAX_LENGTH), asked.rows, asked.repeats)
        rows = json.loads((folder / "job" / "rows.json").read_text())
        shutil.copytree(folder / "base", many / "base")
        make_base(many, SIZES[asked.job_size])
        jobs = many_jobs(many, tokenise(folder, _SHORT), asked.job_batch, quick=asked.quick)
        jobs["size"] = asked.job_size
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [lengths[first : first + _BATCH] for first in range(0, len(lengths), _BATCH)]
    speed = {name: one["tokens_per_cpu_second"] for name, one in table.items()}
    most = jobs["by_count"][str(_JOBS)]
    return {
        "tokens_per_cpu_second": speed["ours"],
        "ratio_vs_hf": speed["ours"] / speed["hf"],
        "ratio_vs_trl_padded": None if asked.quick else speed["ours"] / speed["trl_padded"],
        "ratio_vs_trl_packing": speed["ours"] / speed["trl_packing"],
        "ratio_k8_vs_fresh_processes": most["ratio_vs_fresh_processes"],
        "ratio_k8_cold_vs_fresh_processes": most["ratio_cold_vs_fresh_processes"],
        "ratio_k8_vs_one_by_one": most.get("ratio_vs_one_by_one"),
        "peak_mb": table["ours"]["peak_mb"],
        "size": asked.size,
        "rows": asked.rows,
        "tokens": sum(lengths),
        "padded_tokens_over_tokens": sum(max(one) * len(one) for one in batches) / sum(lengths),
        "table": table,
        "jobs": jobs,
    }


def show(found: dict[str, Any]) -> None:
    padding = found["padded_tokens_over_tokens"]
    print(f"{found['rows']} conversations, {found['tokens']:,} tokens, {_BATCH} rows a step, "
          f"padding would be {padding:.2f}x; base: {found['size']}\n")  # fmt: skip
    print(f"{'':26}{'tokens per CPU s':>18}{'CPU s':>8}{'peak MB':>9}{'held-out loss':>18}"
          f"{'ours is':>9}")  # fmt: skip
    for name, one in found["table"].items():
        title = _NAMES[name]
        losses = f"{one['held_out_loss_before']:.4f} > {one['held_out_loss']:.4f}"
        speed = one["tokens_per_cpu_second"]
        print(f"{title:26}{speed:18,.0f}{one['cpu_seconds']:8.1f}{one['peak_mb']:9.0f}"
              f"{losses:>18}{found['tokens_per_cpu_second'] / speed:8.2f}x")  # fmt: skip
    _show_jobs(found["jobs"])


def _show_jobs(jobs: dict[str, Any]) -> None:
    print(f"\nK jobs of {jobs['steps']} steps of {jobs['batch']} x up to {jobs['rows_up_to']} "
          f"tokens, base: {jobs['size']}; CPU seconds\n")  # fmt: skip
    print(f"{'K':>3}{'tokens':>9}{'warm, together':>16}{'warm, in turn':>15}{'start + load':>14}"
          f"{'fresh: training':>17}{'all':>8}{'warm is':>9}{'cold is':>9}")  # fmt: skip
    for count, row in jobs["by_count"].items():
        mine, theirs = row["together"], row["fresh_processes"]
        in_turn = f"{row['one_by_one']['cpu_seconds']:.1f}" if row["one_by_one"] else "-"
        print(f"{count:>3}{row['tokens']:9,}{mine['cpu_seconds']:16.1f}{in_turn:>15}"
              f"{mine['start_seconds']:14.1f}{theirs['cpu_seconds']:17.1f}"
              f"{theirs['process_seconds']:8.1f}{row['ratio_vs_fresh_processes']:8.2f}x"
              f"{row['ratio_cold_vs_fresh_processes']:8.2f}x")  # fmt: skip
    if jobs["fresh_processes_measured"] < _JOBS:
        print(f"(fresh processes: the mean of {jobs['fresh_processes_measured']}, times K)")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), help="of the base (medium; quick: small)")
    parser.add_argument("--rows", type=int, help="conversations of the one job (64; quick: 24)")
    parser.add_argument("--job-size", choices=list(SIZES), help="base of the small jobs (small)")
    parser.add_argument("--job-batch", type=int, default=1, help="rows a step of the small jobs")
    parser.add_argument("--repeats", type=int, help="turns of the one job; the best counts (2)")
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("jobs", nargs="*", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print("\n" + json.dumps(child(asked.child, asked.folder, asked.jobs)))
        return 0
    missing = [name for name in ("datasets", "trl") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} missing: run `make install-bench` first", file=sys.stderr)
        return 2
    asked.size = asked.size or ("small" if asked.quick else "medium")
    asked.job_size = asked.job_size or ("tiny" if asked.size == "tiny" else "small")
    asked.rows = asked.rows or (24 if asked.quick else 64)
    asked.repeats = asked.repeats or (1 if asked.quick else 2)
    found = compare(asked)
    if asked.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
