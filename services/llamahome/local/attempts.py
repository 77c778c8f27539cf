"""The training stage here, tried until it is through: an engine that dies is started again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from llamahome.errors import WorkerLost
from llamahome.local.kept import KeptCheckpoints
from llamahome.local.pipeline import Stages, run_job
from llamahome.local.watch import Watch
from llamahome.schemas import JobSpec, RunOutput, Stage, StageFunction
from llamahome.storage import LocalStorage


def data_stages() -> Stages:
    """The two stages before training, as the queue workers run them."""
    from llamahome.preprocessing import stage as preprocessing
    from llamahome.validation import stage as validation

    return {
        Stage.validation: (validation.run, validation.key),
        Stage.preprocessing: (preprocessing.run, preprocessing.key),
    }


def train_in_attempts(
    spec: JobSpec,
    storage: LocalStorage,
    prepared: Sequence[RunOutput],
    scratch: Path,
    *,
    stage: StageFunction,
    kept: KeptCheckpoints,
    watch: Watch,
    max_attempts: int,
) -> Path:
    """The published adapter's folder in ``storage``, from what the data stages ``prepared``.

    Goes on from the newest checkpoint that is whole. Raises what the stage raises, WorkerLost after
    ``max_attempts`` without a new checkpoint in between.
    """
    from llamahome.training import key

    stages: Stages = {**data_stages(), Stage.training: (stage, key)}
    newest = kept.find(watch.warn)
    tries, reached = 0, kept.newest_step
    for fence in itertools.count(newest + 1):
        points = kept.newest_first()
        try:
            outputs = run_job(
                spec, storage, scratch, stages=stages, done=prepared,
                fence=fence, resume=points[0] if points else None, earlier=points[1:],
                on_event=watch.event, on_progress=watch.progress,
                on_checkpoint=kept.add, should_stop=watch.should_stop,
            )  # fmt: skip
        except WorkerLost as error:
            tries = 1 if kept.newest_step > reached else tries + 1
            reached = kept.newest_step
            if tries >= max_attempts or (watch.should_stop is not None and watch.should_stop()):
                raise
            watch.warn(f"{error} Going on from step {reached}")
            continue
        break
    [*_, trained] = outputs.values()
    assert trained.artifact is not None, "training publishes its adapter"
    return storage.root / trained.artifact.path
