"""A whole job in one process: the same runs in the same order as in the fleet, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from llamahome.local.ports import LocalPorts, ShouldStop
from llamahome.schemas import (
    CheckpointRef,
    JobSpec,
    JsonObject,
    NewEvent,
    RunOutput,
    Stage,
    StageFunction,
    StageKey,
    StageTask,
    Step,
)
from llamahome.storage import Storage, artifact_path, attempt_path

RunPlace: TypeAlias = tuple[Stage, Step, int]
Stages: TypeAlias = Mapping[Stage, tuple[StageFunction, StageKey]]

_ORDER = (
    (Stage.validation, Step.shard),
    (Stage.validation, Step.close),
    (Stage.preprocessing, Step.shard),
    (Stage.preprocessing, Step.close),
    (Stage.training, Step.train),
)


def run_job(
    spec: JobSpec,
    storage: Storage,
    scratch: Path,
    *,
    stages: Stages,
    job_id: str = "local",
    fence: int = 1,
    resume: CheckpointRef | None = None,
    earlier: Sequence[CheckpointRef] = (),
    done: Sequence[RunOutput] = (),
    on_event: Callable[[Stage, NewEvent], None] | None = None,
    on_progress: Callable[[Stage, int, int | None, Mapping[str, Any]], None] | None = None,
    on_checkpoint: Callable[[CheckpointRef], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[RunPlace, RunOutput]:
    """Run every run of the job whose stage is in ``stages``, up to the first that is not.

    Artifacts of a keyed run lie under their key, so that equal work gives one artifact; the others
    under (``job_id``, ``fence``), which a second try must therefore raise. ``scratch`` holds one
    attempt's files at a time and is emptied after each. ``done`` are all outputs of stages that an
    earlier try finished; ``earlier`` are the checkpoints before ``resume``, newest first.
    Raises what the stages raise; whatever was published before stays.
    """
    outputs: dict[RunPlace, RunOutput] = {(out.stage, out.step, out.shard): out for out in done}
    finished = {out.stage for out in done}
    planned: tuple[JsonObject, ...] = ()
    for stage, step in _ORDER:
        if stage not in stages:
            break
        if stage in finished:
            continue
        function, key = stages[stage]
        plans = _plans(spec, stage, planned) if step is Step.shard else ({},)
        planned = ()
        for shard, plan in enumerate(plans):
            task = StageTask(
                job_id=job_id, run_id=f"{stage}-{step}-{shard}", fence=fence, stage=stage,
                step=step, shard=shard, spec=spec, plan=plan, inputs=tuple(outputs.values()),
                resume=resume if stage is Stage.training else None,
                earlier=tuple(earlier) if stage is Stage.training else (),
            )  # fmt: skip
            ports = LocalPorts(
                storage, scratch / task.run_id, _prefix(task, key),
                on_event=_for_stage(on_event, stage), on_progress=_for_stage(on_progress, stage),
                on_checkpoint=on_checkpoint, should_stop=should_stop,
            )  # fmt: skip
            try:
                result = function(task, ports)
            finally:
                shutil.rmtree(ports.scratch, ignore_errors=True)
            outputs[stage, step, shard] = RunOutput(
                stage=stage, step=step, shard=shard, artifact=result.artifact,
                summary=result.summary,
            )  # fmt: skip
            planned += result.next_plans
    return outputs


def byte_ranges(spec: JobSpec) -> Iterator[JsonObject]:
    """The plans of the validation shards, training files first. An empty file has one, empty."""
    for split, files in (("training", spec.training_files), ("validation", spec.validation_files)):
        for index, file in enumerate(files):
            for start in range(0, max(file.bytes, 1), spec.shard_bytes):
                end = min(start + spec.shard_bytes, file.bytes)
                yield {"split": split, "file": index, "start": start, "end": end}


def _plans(spec: JobSpec, stage: Stage, planned: tuple[JsonObject, ...]) -> tuple[JsonObject, ...]:
    return tuple(byte_ranges(spec)) if stage is Stage.validation else planned


def _prefix(task: StageTask, key: StageKey) -> str:
    digest = key(task)
    if digest is not None:
        return artifact_path(digest)
    return attempt_path(task.job_id, task.run_id, task.fence)


def _for_stage(callback: Callable[..., None] | None, stage: Stage) -> Callable[..., None] | None:
    if callback is None:
        return None
    return lambda *values: callback(stage, *values)
