"""The names of models: a registered base, or what a tenant's job made of one, which can be gone
on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llamahome.config import (
    ADAPTER_CONFIG_NAME,
    EarlierAdapter,
    TrainingConfig,
    read_adapter_config,
    resolve_training_config,
)
from llamahome.errors import InvalidState, NotFound
from llamahome.ledger import Ledger
from llamahome.schemas import ArtifactRef, BaseRef, Job, JobState
from llamahome.storage import Storage

JOB_ID_PREFIX = "ftjob-"
FINE_TUNED_PREFIX = "ft:"
_MAX_CONFIG_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training starts from: a base, and the earlier adapter where it goes on from one."""

    base: BaseRef
    adapter: ArtifactRef | None = None
    earlier: EarlierAdapter | None = None


def fine_tuned_name(job: Job) -> str:
    """``ft:<base>:<tenant>:<suffix>:<id>``; the last part finds the job again."""
    spec = job.spec
    tail = job.id.removeprefix(JOB_ID_PREFIX)
    return f"{FINE_TUNED_PREFIX}{spec.base.name}:{job.tenant}:{spec.suffix or ''}:{tail}"


def fine_tuned_job(ledger: Ledger, tenant: str, name: str) -> Job:
    """The succeeded job of the tenant that made the model. Raises NotFound."""
    job_id = JOB_ID_PREFIX + name.rpartition(":")[2]
    try:
        job = ledger.job(job_id, tenant)
    except NotFound:
        raise _no_model(name) from None
    if job.state is not JobState.succeeded or fine_tuned_name(job) != name:
        raise _no_model(name)
    return job


def resolve_start(ledger: Ledger, storage: Storage, tenant: str, model: str) -> Start:
    """What ``model`` names. Raises NotFound (nothing of this tenant), InvalidState
    (``base_changed``: the adapter's base is no longer what it was trained on), InvalidConfig (an
    adapter that cannot be gone on from), Unavailable."""
    if not model.startswith(FINE_TUNED_PREFIX):
        base = ledger.base(model)
        return Start(BaseRef(name=base.name, path=base.path, digest=base.digest))
    job = fine_tuned_job(ledger, tenant, model)
    was, base = job.spec.base, ledger.base(job.spec.base.name)
    if base.digest != was.digest:
        raise InvalidState(
            f"{model} was trained on base {was.name!r} with digest {was.digest[:12]}, and the one "
            f"registered now has {base.digest[:12]}", code="base_changed", field="model",
            remedy="Register the base's earlier files again, or train anew from the base",
        )  # fmt: skip
    if job.adapter is None:
        raise _no_model(model)
    try:
        with storage.open(f"{job.adapter.path}/{ADAPTER_CONFIG_NAME}") as stream:
            content = stream.read(_MAX_CONFIG_BYTES)
    except NotFound:
        raise NotFound(
            f"the files of {model!r} are no longer there", code="model_not_found", field="model",
            remedy="Train it again",
        ) from None  # fmt: skip
    earlier = read_adapter_config(content, model)
    return Start(BaseRef(name=base.name, path=base.path, digest=base.digest), job.adapter, earlier)


def effective_config(start: Start, recipe: str | None, config: Mapping[str, Any]) -> TrainingConfig:
    """The configuration that a submission comes to. Raises InvalidConfig or NotFound.

    An earlier adapter's own LoRA beats the file and the recipe, which do not know of it; what the
    submission itself sets must agree with it.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [("config", config)]
    if start.earlier is not None:
        layers.insert(0, (f"adapter {start.earlier.name}", start.earlier.layer))
    found = resolve_training_config(model_name=start.base.name, recipe=recipe, layers=layers)
    if start.earlier is not None:
        start.earlier.check(found)
    return found


def _no_model(name: str) -> NotFound:
    return NotFound(
        f"The model {name!r} does not exist", code="model_not_found", field="model",
        remedy="GET /v1/models lists those there are",
    )  # fmt: skip
