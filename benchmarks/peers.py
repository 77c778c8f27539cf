"""The contenders of training.py, each in a process of its own: what they do, and what is charged.

ours         the engine, in process: ``loop.train`` on a loaded base, self-checks and all
hf           transformers.Trainer + peft; the batch padded to its longest row, sdpa attention
trl_padded   trl.SFTTrainer + peft; padded in the same way
trl_packing  trl.SFTTrainer + peft, packing by its default strategy (bfd, which is padding-free:
             a step's packs end to end in one row, with a block-diagonal mask for sdpa)
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prepared import job_spec

Result = dict[str, Any]


class Ports:
    """Ports of a training that nobody watches."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True)

    def progress(self, *_: Any, **__: Any) -> None: ...

    def event(self, *_: Any, **__: Any) -> None: ...

    def checkpoint(self, point: Any) -> None: ...

    def should_stop(self) -> None: ...


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def read_rows_of(job: Path) -> list[dict[str, list[int]]]:
    rows: list[dict[str, list[int]]] = json.loads((job / "rows.json").read_text())
    return rows


class Ours:
    """A base loaded once, and engines on it."""

    def __init__(self, folder: Path, tick_tokens: int = 0) -> None:
        from llamahome.config import parse_training_config
        from llamahome.storage.bases import base_digest
        from llamahome.training.model import load_base
        from llamahome.training.runtime import Runtime, choose_machine

        _one_thread()
        self.base_folder = folder / "base"
        self.digest = base_digest(self.base_folder)
        self._parse = parse_training_config
        self.runtime = Runtime("cpu", 1, tick_tokens=tick_tokens)
        self.machine = choose_machine(self.runtime, parse_training_config({}, source="benchmark"))
        spec = job_spec(self.base_folder, {}, self.digest)
        self.base = load_base(spec.base, self.machine)

    def read(self, job: Path) -> tuple[Any, Any, Any]:
        """Spec, config and data of a job's folder."""
        from llamahome.training.data import TokenData

        config = self._parse(json.loads((job / "settings.json").read_text()), source="benchmark")
        spec = job_spec(self.base_folder, config.model_dump(mode="json"), self.digest)
        return spec, config, TokenData.open(job)

    def train(self, job: Path) -> Any:
        """One job as the stage has it done: a TrainedAdapter."""
        from llamahome.training.loop import train

        spec, _, data = self.read(job)
        ports: Any = Ports(job / "scratch")
        return train(spec, data, ports, runtime=self.runtime, base=self.base)

    def on(self, engine: Any, jobs: list[Path]) -> list[Any]:
        """Jobs together on one engine; the adapters in the order of the jobs."""
        ended: dict[Path, Any] = {}
        for job in jobs:
            spec, config, data = self.read(job)
            ports: Any = Ports(job / "scratch")
            engine.admit(spec, config, data, ports, self.machine, _into(ended, job))
        engine.run()
        for outcome in ended.values():
            if isinstance(outcome, Exception):
                raise outcome
        return [ended[job] for job in jobs]


def _into(ended: dict[Path, Any], job: Path) -> Callable[[Any], None]:
    def end(outcome: Any) -> None:
        ended[job] = outcome

    return end


def ours(folder: Path, job: Path) -> Result:
    warm = Ours(folder)
    begin = time.process_time()
    outcome = warm.train(job)
    found = _result(begin, outcome.report.metrics.train_loss)
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(_fresh_model(folder), outcome.folder)
    return found | _held_out(model.eval(), folder, torch)


def together(folder: Path, jobs: list[Path], *, at_once: bool) -> Result:
    """The jobs on one warm engine, all from one tick on or one after another."""
    from llamahome.training.engine.ticks import Engine

    begun = time.process_time()
    warm = Ours(folder)
    loaded = time.process_time()
    engine = Engine(warm.base, warm.machine)
    try:
        for some in [jobs] if at_once else [[job] for job in jobs]:
            warm.on(engine, some)
    finally:
        engine.close()
    # Imports are a part of the load: what a process needs before its first job.
    return _result(loaded, None) | {"load_seconds": loaded - begun, "start_seconds": loaded}


def _result(begin: float, loss: float | None) -> Result:
    now = time.process_time()
    return {
        "cpu_seconds": now - begin, "process_seconds": now, "peak_mb": peak_mb(),
        "last_step_loss": loss,
    }  # fmt: skip


def _fresh_model(folder: Path) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="sdpa"
    )


def _lora(settings: dict[str, Any]) -> Any:
    from peft import LoraConfig

    lora = settings["lora"]
    return LoraConfig(
        task_type="CAUSAL_LM", r=lora["r"], lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"], target_modules=lora["target_modules"],
    )  # fmt: skip


def _arguments(job: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What both trainers are told: the settings, and to do nothing on the side."""
    return {
        "output_dir": str(job / "out"), "per_device_train_batch_size": settings["batch_size"],
        "num_train_epochs": settings["epochs"], "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "linear", "weight_decay": settings["weight_decay"],
        "max_grad_norm": 1.0, "seed": settings["seed"], "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "train_sampling_strategy": "sequential",
        "eval_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "logging_strategy": "no",
    }  # fmt: skip


def hf(folder: Path, job: Path) -> Result:
    _one_thread()
    import torch
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    settings = json.loads((job / "settings.json").read_text())
    model = get_peft_model(_fresh_model(folder), _lora(settings))
    trainer = Trainer(
        model=model, args=TrainingArguments(**_arguments(job, settings)),
        train_dataset=read_rows_of(job),
        data_collator=DataCollatorForSeq2Seq(_tokenizer(folder), label_pad_token_id=-100),
    )  # fmt: skip
    return _trained(trainer, folder, torch)


def trl(folder: Path, job: Path, *, packing: bool, packed_length: int) -> Result:
    _one_thread()
    import datasets
    import torch
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    settings = json.loads((job / "settings.json").read_text())
    config = SFTConfig(
        **_arguments(job, settings), packing=packing, max_length=packed_length,
        shuffle_dataset=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=_fresh_model(folder), args=config, peft_config=_lora(settings),
        train_dataset=datasets.Dataset.from_list(read_rows_of(job)),
        processing_class=_tokenizer(folder),
    )  # fmt: skip
    return _trained(trainer, folder, torch)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "base")


def _trained(trainer: Any, folder: Path, torch: Any) -> Result:
    begin = time.process_time()
    done = trainer.train()
    found = _result(begin, None) | {"mean_loss": done.training_loss}
    found["optimizer_steps"] = done.global_step
    return found | _held_out(trainer.model.eval(), folder, torch)


def _held_out(model: Any, folder: Path, torch: Any) -> Result:
    """Mean loss of a labelled token on rows nobody trained on, with and without the adapter.

    Row by row, the same for everyone; nothing where the folder holds no such rows.
    """
    path = folder / "held_out.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())

    def mean() -> float:
        summed, count = 0.0, 0
        for row in rows:
            ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None]).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
            summed += float(each.sum())
            count += int((labels[1:] != -100).sum())
        return summed / count

    with torch.no_grad():
        after = mean()
        with model.disable_adapter():
            return {"held_out_loss": after, "held_out_loss_before": mean()}
