"""Canonical rows to token shards, against datasets.map and TRL's own preparation, in one run.

    python benchmarks/preprocessing.py [--rows N] [--workers N] [--repeats N] [--json]

Every contender gets the same generated conversations, tokenizer and chat template, runs in a
process of its own on one core's worth of work, and is charged its CPU seconds (with its children's)
and its peak memory; imports and reading the tokenizer are not charged. Peers: `make install-bench`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from generated import MAX_LENGTH, fresh, make_data, read_rows

_NAMES = {
    "ours": "llamahome, rows to shards",
    "ours_slow": "llamahome, slow path",
    "core": "tokenizer core alone",
    "datasets": "datasets.map, ids and mask",
    "trl": "TRL preparation, no packing",
    "trl_packing": "TRL preparation, packing",
}


def ours(folder: Path, share: int, of: int, *, slow: bool = False) -> Callable[[], int]:
    """The stage's own shard function over canonical rows, then the packing plan."""
    import hashlib

    from llamahome.config import parse_training_config
    from llamahome.conversations.packing import plan_packs, write_packs
    from llamahome.conversations.tokens import read_token_rows
    from llamahome.local import LocalPorts
    from llamahome.preprocessing.base import load_base
    from llamahome.preprocessing.shard import write_shard
    from llamahome.schemas import BaseRef, FileRef, JobSpec, RunOutput, Stage, StageTask, Step
    from llamahome.storage import LocalStorage

    work = folder / f"ours-{slow}-{share}-{of}"
    (work / "rows").mkdir(parents=True)
    with (work / "rows" / "rows.jsonl").open("w", encoding="utf-8") as out:
        count = 0
        for row in read_rows(folder, share, of):
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
            count += 1
    digest = hashlib.sha256().hexdigest()
    file = FileRef(id="file-bench", filename="rows.jsonl", path="none", sha256=digest, bytes=1)
    settings = parse_training_config({"max_length": MAX_LENGTH}, source="benchmark")
    spec = JobSpec(
        tenant="bench", training_files=(file,), validation_files=(), shard_bytes=1 << 30,
        base=BaseRef(name="bench", path=str(folder / "base"), digest=digest),
        config=settings.model_dump(mode="json"), min_examples=1,
    )  # fmt: skip
    storage = LocalStorage(work / "storage")
    ports = LocalPorts(storage, work / "scratch", "artifacts/bench")
    rows = RunOutput(
        stage=Stage.validation, step=Step.shard, shard=0,
        artifact=ports.publish(work / "rows", "rows"),
        summary={"rows": count, "file": "rows.jsonl", "split": "training", "index": 0},
    )  # fmt: skip
    task = StageTask(
        job_id="bench", run_id="bench", fence=1, stage=Stage.preprocessing, step=Step.shard,
        shard=0, spec=spec, inputs=(rows,),
        plan={"split": "training", "rows": 0, "index": 0, "first_line": 0},
    )  # fmt: skip
    load_base(task).fast("assistant")

    def run() -> int:
        summary = write_shard(task, ports, work / "tokens", refused="asked" if slow else None)
        if not slow and summary["path"] != "fast":
            raise SystemExit(f"the fast path was not taken: {summary['path']}")
        tokens = read_token_rows(work / "tokens" / "tokens.safetensors")
        packs = plan_packs(tokens.lengths, capacity=MAX_LENGTH)
        write_packs(work / "tokens" / "packs.safetensors", packs)
        return tokens.total_tokens

    return run


def core(folder: Path, share: int, of: int) -> Callable[[], int]:
    """tiktoken's core over the texts, in memory: what no pipeline around it can beat."""
    from llamahome.conversations.tokenizer import ChatTokenizer

    encode = ChatTokenizer.load(folder / "base").byte_level().encode
    texts = [
        f"{message['role']}\n{message['content']}"
        for row in read_rows(folder, share, of) for message in row["messages"]
    ]  # fmt: skip
    return lambda: sum(len(encode(text)) for text in texts)


def _reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "base")


def _dataset(folder: Path, share: int, of: int) -> Any:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = [{"messages": row["messages"]} for row in read_rows(folder, share, of)]
    return datasets.Dataset.from_list(rows)


def mapped(folder: Path, share: int, of: int) -> Callable[[], int]:
    """datasets.map with apply_chat_template and its assistant mask, row by row."""
    tokenizer, data = _reference(folder), _dataset(folder, share, of)

    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            truncation=True, max_length=MAX_LENGTH,
        )  # fmt: skip
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    def run() -> int:
        found = data.map(tokens, remove_columns=["messages"])
        found.save_to_disk(str(folder / "mapped"))
        return sum(map(len, found["input_ids"]))

    return run


def trl(folder: Path, share: int, of: int, *, packing: bool) -> Callable[[], int]:
    """SFTTrainer's own preparation, loss on the assistant alone."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer, data = _reference(folder), _dataset(folder, share, of)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1, vocab_size=len(tokenizer))
    )  # fmt: skip
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_length=MAX_LENGTH, packing=packing,
        assistant_only_loss=True, report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip

    def run() -> int:
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer
        )
        return sum(map(len, trainer.train_dataset["input_ids"]))

    return run


def _contender(name: str, folder: Path, share: int, of: int) -> Callable[[], int]:
    if name == "core":
        return core(folder, share, of)
    if name == "datasets":
        return mapped(folder, share, of)
    if name.startswith("trl"):
        return trl(folder, share, of, packing=name == "trl_packing")
    return ours(folder, share, of, slow=name == "ours_slow")


def child(name: str, folder: Path, share: int, of: int) -> None:
    """Run one contender once and print what it took; its work starts when stdin says so."""
    run = _contender(name, folder, share, of)
    print("ready", flush=True)
    sys.stdin.readline()
    before = _cpu_seconds()
    tokens = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"tokens": tokens, "cpu_seconds": _cpu_seconds() - before, "peak_mb": peak}
    print(json.dumps(result), flush=True)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(name: str, folder: Path, workers: int = 1) -> dict[str, float]:
    """``workers`` processes at once, each on its share of the rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    with ExitStack() as running:
        started = [
            running.enter_context(
                _running([*command, "--share", str(share), "--of", str(workers)], environment)
            )
            for share in range(workers)
        ]
        return _figures(started, name)


@contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The process, which does not outlive the block, however that ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def _figures(started: list[subprocess.Popen[str]], name: str) -> dict[str, float]:
    for process in started:
        _until_ready(process, name)
    begin = time.monotonic()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [_result(process) for process in started]
    # A worker goes on to its next shard: the end of an interpreter is not part of the work.
    seconds = time.monotonic() - begin
    for process in started:
        if process.wait():
            raise SystemExit(f"{name} ended with status {process.returncode}")
    cpu = sum(one["cpu_seconds"] for one in found)
    tokens = sum(one["tokens"] for one in found)
    return {
        "tokens": tokens, "cpu_seconds": cpu, "tokens_per_cpu_second": tokens / cpu,
        "tokens_per_second": tokens / seconds,
        "peak_mb": max(one["peak_mb"] for one in found),
    }  # fmt: skip


def _result(process: subprocess.Popen[str]) -> dict[str, float]:
    """The object a child prints when its work is done; peers may print lines before it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"tokens"'):
            found: dict[str, float] = json.loads(line)
            return found
    raise SystemExit(f"a contender ended with status {process.wait()} and no result")


def _until_ready(process: subprocess.Popen[str], name: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            return
    raise SystemExit(f"{name} did not start (status {process.wait()})")


def compare(rows: int, workers: int, repeats: int) -> dict[str, Any]:
    """The whole table, and the figures to hold it against. The least CPU of ``repeats`` counts."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_data(data, rows)

        def best(name: str, figure: str, count: int = 1) -> dict[str, float]:
            found = [measure(name, fresh(data), count) for _ in range(repeats)]
            return max(found, key=lambda one: one[figure])

        # Scaling first: the hosts of small machines take a second core back after minutes of work.
        ours, core = (scaling(name, data, workers, repeats) for name in ("ours", "core"))
        table = {name: best(name, "tokens_per_cpu_second") for name in _NAMES}
    speed = {name: one["tokens_per_cpu_second"] for name, one in table.items()}
    return {
        "tokens_per_cpu_second": speed["ours"],
        "ratio_vs_trl_packing": speed["ours"] / speed["trl_packing"],
        "ratio_vs_datasets_map": speed["ours"] / speed["datasets"],
        "ratio_vs_core": speed["ours"] / speed["core"],
        "scaling_2_workers": ours.get("2"),
        "scaling": ours,
        "scaling_core": core,
        "peak_mb": table["ours"]["peak_mb"],
        "rows": rows,
        "table": table,
    }


def scaling(name: str, data: Path, workers: int, repeats: int) -> dict[str, float]:
    """Wall-clock speed of 1..``workers`` processes over that of one; the best of each counts.

    Counts take turns, so that a neighbour who comes and goes does not meet one of them alone. The
    core alone, which shares nothing but the machine, shows what the machine allows.
    """
    speeds = {count: 0.0 for count in range(1, workers + 1)}
    for _ in range(repeats):
        for count in speeds:
            speed = measure(name, fresh(data), count)["tokens_per_second"]
            speeds[count] = max(speeds[count], speed)
    return {str(count): value / speeds[1] for count, value in speeds.items()}


def show(found: dict[str, Any]) -> None:
    print(f"{found['rows']:,} conversations, {found['table']['ours']['tokens']:,} tokens\n")
    print(f"{'':30}{'tokens per CPU s':>18}{'CPU s':>9}{'peak MB':>9}{'ours is':>10}")
    ours = found["tokens_per_cpu_second"]
    for name, title in _NAMES.items():
        one = found["table"][name]
        speed = one["tokens_per_cpu_second"]
        print(f"{title:30}{speed:18,.0f}{one['cpu_seconds']:9.2f}{one['peak_mb']:9.0f}"
              f"{ours / speed:9.2f}x")  # fmt: skip
    print("\nprocesses at once, wall clock")
    for name, figures in (("ours", found["scaling"]), ("core", found["scaling_core"])):
        line = ", ".join(f"{count}: {value:.2f}x" for count, value in figures.items())
        print(f"{_NAMES[name]:30}{line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=list(_NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.folder, asked.share, asked.of)
        return 0
    missing = [name for name in ("datasets", "trl") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} missing: run `make install-bench` first", file=sys.stderr)
        return 2
    found = compare(asked.rows, asked.workers, asked.repeats)
    if asked.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
