"""Which files in ``samples/`` are read, and how they become a prepared set."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from llamahome.config import Settings, TrainingConfig
from llamahome.errors import InvalidData
from llamahome.local.attempts import data_stages
from llamahome.local.bases import Model
from llamahome.local.inputs import StorageWithInputs, read_inputs
from llamahome.local.pipeline import Stages, run_job
from llamahome.local.processed import ProcessReport, lay_out, put_in_place
from llamahome.local.tree import Tree, work_folder
from llamahome.local.watch import Watch
from llamahome.schemas import (
    BaseRef,
    JobSpec,
    Ports,
    Stage,
    StageResult,
    StageTask,
    Step,
)

TENANT = "local"


def sample_files(folder: Path) -> list[Path]:
    """Every ``*.jsonl`` in the folder by name: no hidden file, no folder, no other suffix (.JSONL,
    .jsonl.gz) and nothing below. Links count as what they lead to; those that lead nowhere are
    kept, so that reading them says so. Raises InvalidData where the folder cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if _is_sample(path.name) and not path.is_dir()]
    except OSError as error:
        raise InvalidData(
            f"cannot be read ({error.strerror})", file=str(error.filename or folder),
            remedy="Let this process read the folder and enter it",
        ) from error  # fmt: skip
    return sorted(found, key=lambda path: path.name)


def _is_sample(name: str) -> bool:
    return name.endswith(".jsonl") and not name.startswith(".")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """All that decides a prepared set."""

    tree: Tree
    model: Model
    base: BaseRef
    files: Sequence[Path]
    config: TrainingConfig
    settings: Settings


def prepare(
    wanted: Preparation, watch: Watch, file_done: Callable[[int], None] = lambda done: None
) -> ProcessReport:
    """Run the data stages and put the set in its place, whole; ``file_done`` is told how many files
    have been read. Nothing is left behind where it raises.

    Raises NotFound, InvalidData, InvalidConfig, InvalidState, Stopped, OSError.
    """
    tree, model = wanted.tree, wanted.model
    inputs = read_inputs(wanted.files, "training")
    spec = JobSpec(
        tenant=TENANT, base=wanted.base, config=wanted.config.model_dump(mode="json"),
        training_files=tuple(each.ref for each in inputs),
        shard_bytes=wanted.settings.shard_bytes,
    )  # fmt: skip
    with work_folder(tree.processed) as work:
        storage = StorageWithInputs(work / "storage", inputs)
        outputs = run_job(
            spec, storage, work / "scratch", stages=_counting(spec, file_done),
            on_event=watch.event, on_progress=watch.progress, should_stop=watch.should_stop,
        )  # fmt: skip
        closed = {out.stage: out for out in outputs.values() if out.step is Step.close}
        report = lay_out(work / "set", storage, closed, spec, model)
        shutil.rmtree(work / "storage")
        place = tree.processed / model.label
        put_in_place(work / "set", place, model)
    return report.model_copy(update={"folder": str(place)})


def _counting(spec: JobSpec, file_done: Callable[[int], None]) -> Stages:
    """The data stages; after the last range of each file, the files done are told of."""
    stages = dict(data_stages())
    check, key = stages[Stage.validation]

    def stage(task: StageTask, ports: Ports) -> StageResult:
        result = check(task, ports)
        if task.step is Step.shard and task.plan["end"] == _size(spec, task):
            file_done(task.plan["file"] + 1)
        return result

    return {**stages, Stage.validation: (stage, key)}


def _size(spec: JobSpec, task: StageTask) -> int:
    return spec.training_files[task.plan["file"]].bytes
