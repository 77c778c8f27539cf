"""The validation stage as the queue worker and the one-machine facade run it."""

from __future__ import annotations

from llamahome.conversations import json_digest
from llamahome.errors import OperatorError
from llamahome.schemas import Ports, StageResult, StageTask, Step
from llamahome.validation.close import close
from llamahome.validation.shard import check_shard, shard_file

# Raise it with every change of what a given input gives: it is part of every key.
CODE_VERSION = 3


def run(task: StageTask, ports: Ports) -> StageResult:
    """Check one byte range, or close the stage. Raises InvalidData, Stopped, Unavailable."""
    if task.step is Step.shard:
        return check_shard(task, ports)
    if task.step is Step.close:
        return close(task, ports)
    raise OperatorError(f"the validation stage has no step {task.step}")


def key(task: StageTask) -> str:
    """The digest of everything that decides the run's output."""
    spec = task.spec
    facts = {
        "stage": "validation", "step": str(task.step), "code": CODE_VERSION,
        "limits": spec.config["validation"],
    }  # fmt: skip
    if task.step is Step.shard:
        file = shard_file(task)
        return json_digest(
            facts
            | {
                "plan": task.plan,
                "name": file.filename,
                "sha256": file.sha256,
                # Rows that cannot be cut where the file is are cut into pieces of this size.
                "piece_bytes": spec.shard_bytes,
            }
        )
    shards = [[output.summary, output.artifact.digest] for output in task.inputs if output.artifact]
    return json_digest(
        facts
        | {
            "shards": shards,
            "files": [[f.filename, f.sha256] for f in spec.training_files + spec.validation_files],
            "max_invalid_share": spec.config["max_invalid_share"],
            "min_examples": spec.min_examples,
        }
    )
