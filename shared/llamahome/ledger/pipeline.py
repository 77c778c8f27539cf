"""The order of a job's runs, as pure functions: what exists at the start and what follows what.

Only one (stage, step) of a job is active at a time, the *frontier*: the first that has a run not
done. It is re-derived from the rows, never counted, so doing it twice is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from llamahome.schemas import FileRef, JobSpec, JobState, JsonObject, RunState, Stage, Step

ORDER: tuple[tuple[Stage, Step], ...] = (
    (Stage.validation, Step.shard),
    (Stage.validation, Step.close),
    (Stage.preprocessing, Step.shard),
    (Stage.preprocessing, Step.close),
    (Stage.training, Step.train),
)


class Placed(Protocol):
    """Anything that has a place in the pipeline."""

    @property
    def stage(self) -> Stage: ...
    @property
    def step(self) -> Step: ...
    @property
    def shard(self) -> int: ...


P = TypeVar("P", bound=Placed)


def in_order(things: Iterable[P]) -> list[P]:
    """Sorted by stage, step and shard, as the pipeline runs them."""
    return sorted(things, key=lambda thing: (ORDER.index((thing.stage, thing.step)), thing.shard))


# The stage whose shards a close step plans.
NEXT_SHARDS: dict[Stage, Stage] = {Stage.validation: Stage.preprocessing}


class NewRun(NamedTuple):
    """A run to be created."""

    stage: Stage
    step: Step
    shard: int
    plan: JsonObject


class RunPlace(NamedTuple):
    """Where an existing run stands."""

    stage: Stage
    step: Step
    state: RunState


def first_runs(spec: JobSpec) -> list[NewRun]:
    """All runs that can be known when the job is accepted: everything but preprocessing shards."""
    runs = [
        NewRun(Stage.validation, Step.shard, number, plan)
        for number, plan in enumerate(_byte_ranges(spec))
    ]
    for stage, step in ORDER:
        if step is not Step.shard:
            runs.append(NewRun(stage, step, 0, {}))
    return runs


def _byte_ranges(spec: JobSpec) -> Iterable[JsonObject]:
    sides: tuple[tuple[str, Sequence[FileRef]], ...] = (
        ("training", spec.training_files),
        ("validation", spec.validation_files),
    )
    for split, files in sides:
        for index, file in enumerate(files):
            # An empty file still has one (empty) range, so that its report says "0 rows".
            for start in range(0, max(file.bytes, 1), spec.shard_bytes):
                end = min(start + spec.shard_bytes, file.bytes)
                yield {"split": split, "file": index, "start": start, "end": end}


def following_runs(stage: Stage, step: Step, plans: Iterable[JsonObject]) -> list[NewRun]:
    """The shards that a finished close step has planned for the stage after it."""
    if step is not Step.close or stage not in NEXT_SHARDS:
        return []
    return [NewRun(NEXT_SHARDS[stage], Step.shard, n, plan) for n, plan in enumerate(plans)]


def frontier(runs: Iterable[RunPlace]) -> tuple[Stage, Step] | None:
    """The first (stage, step) with a run that is not done; None when all are."""
    open_places = {(run.stage, run.step) for run in runs if run.state is not RunState.done}
    return next((place for place in ORDER if place in open_places), None)


def job_state(place: tuple[Stage, Step] | None, *, active: bool, started: bool) -> JobState:
    """The job's state from its frontier.

    ``active``: a run of the frontier is claimed. ``started``: any run was ever claimed.
    """
    if place is None:
        return JobState.succeeded
    stage, _ = place
    if stage is Stage.validation:
        return JobState.validating if started else JobState.accepted
    if stage is Stage.preprocessing:
        return JobState.preparing
    return JobState.running if active else JobState.queued
