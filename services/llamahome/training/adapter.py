"""The adapter's own files, as PEFT and vLLM load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llamahome.config.training import LoraConfig
from llamahome.training.engine.slots import Slot
from llamahome.training.tensors import save_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def write_adapter(
    folder: Path, slot: Slot, lora: LoraConfig, base_name: str, fan_in_fan_out: bool
) -> None:
    """Weights and config into a new ``folder``; an older one of that name is replaced.

    The bytes are a function of the weights: no clock, host or path is in them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tensors(slot.tensors(), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    # safetensors makes files for their owner alone; those who serve it are others.
    (folder / WEIGHTS_NAME).chmod(0o644)
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        # An integer where it is one: servers declare the field as int.
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": list(slot.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.use_rslora,
    }
    if slot.tokens is not None:
        config["trainable_token_indices"] = slot.tokens.indices()
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
