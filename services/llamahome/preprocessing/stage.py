"""The preprocessing stage as the queue worker and the one-machine facade run it."""

from __future__ import annotations

import tiktoken
import tokenizers

from llamahome.conversations import json_digest
from llamahome.conversations.formats import TEXT
from llamahome.errors import OperatorError
from llamahome.preprocessing.base import load_base
from llamahome.preprocessing.close import close
from llamahome.preprocessing.shard import rows_of_plan, tokenise_shard
from llamahome.schemas import JsonObject, Ports, Stage, StageResult, StageTask, Step

# Raise it with every change of what a given input gives: it is part of every key.
CODE_VERSION = 3


def run(task: StageTask, ports: Ports) -> StageResult:
    """Tokenise one shard, or close the stage.

    Raises InvalidConfig and NotFound (the base), InvalidData, Stopped, Unavailable.
    """
    if task.step is Step.shard:
        return tokenise_shard(task, ports)
    if task.step is Step.close:
        return close(task, ports)
    raise OperatorError(f"the preprocessing stage has no step {task.step}")


def key(task: StageTask) -> str:
    """The digest of everything that decides the run's output. Raises as the base's reading does."""
    return json_digest(_shard_facts(task) if task.step is Step.shard else _close_facts(task))


def _base_facts(task: StageTask) -> JsonObject:
    base = load_base(task)
    return {
        "stage": "preprocessing",
        "step": str(task.step),
        "code": CODE_VERSION,
        "tokenizers": tokenizers.__version__,
        "tiktoken": tiktoken.__version__,
        "tokenizer": base.tokenizer_digest,
        "template": base.template_digest,
        "vocabulary": base.vocabulary,
        "loss_scope": task.spec.config["loss_scope"],
    } | ({} if base.markers is None else {"markers": base.markers.added})


def _shard_facts(task: StageTask) -> JsonObject:
    source = rows_of_plan(task)
    assert source.artifact is not None, "a validation shard always has an artifact"
    config = task.spec.config
    base = load_base(task)
    raw_text = source.summary.get("format") == TEXT
    around = {"around": base.chat.tokenizer.around} if raw_text else {}
    return (
        _base_facts(task)
        | around
        | {
            "rows": source.artifact.digest,
            "file": source.summary["index"],
            "piece": task.plan.get("piece"),
            "first_line": task.plan["first_line"],
            "split": task.plan["split"],
            "today": task.plan.get("today") if base.chat.uses_clock else None,
            "max_length": config["max_length"],
            "too_long": config["too_long"],
        }
    )


def _close_facts(task: StageTask) -> JsonObject:
    config = task.spec.config
    shards = [
        [output.summary, output.artifact.digest]
        for output in task.outputs_of(Stage.preprocessing, Step.shard)
        if output.artifact
    ]
    return _base_facts(task) | {
        "shards": shards,
        "seed": config["seed"],
        "validation_split": config["validation_split"],
        "duplicates": config["duplicates"],
        "packing": config["max_length"] if config["packing"] else None,
        "given_validation": bool(task.spec.validation_files),
        "files": load_base(task).files_digest,
    }
