"""Every queue and task name, once. A stock Celery sender needs exactly these strings."""

from __future__ import annotations

from llamahome.schemas import Stage

SUBMISSIONS_QUEUE = "llamahome.submissions"
SUBMIT_TASK = "llamahome.submit"


def queue_name(stage: Stage, *, recover: bool = False) -> str:
    """The stage's queue, or its ``.recover`` twin, which workers serve first."""
    return f"llamahome.{stage}.recover" if recover else f"llamahome.{stage}"


def ring_task(stage: Stage) -> str:
    """The one task of a stage's queues: "there may be work"."""
    return f"llamahome.ring.{stage}"


def stage_queues(stage: Stage) -> tuple[str, str]:
    """In the order they are served."""
    return queue_name(stage, recover=True), queue_name(stage)


ALL_QUEUES: tuple[str, ...] = (
    *(name for stage in Stage for name in stage_queues(stage)),
    SUBMISSIONS_QUEUE,
)
