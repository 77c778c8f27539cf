"""Every Prometheus series served: name, type, help, labels. Nothing is named elsewhere.

Label values come from enums only; job ids, users, files and exception texts never become labels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

STAGES = ("validation", "preprocessing", "training")
# Error codes that may be a `reason`; any other is counted as "other".
REASONS = frozenset(
    {
        "", "invalid_training_file", "invalid_n_examples", "invalid_value", "unknown_parameter",
        "model_not_found", "file_not_found", "not_found", "nan_loss", "out_of_memory",
        "training_failed", "worker_lost", "internal_error", "corrupt_artifact", "user_error",
        "invalid_api_key", "active_jobs_limit_exceeded",
        "disk_full", "unavailable", "broken_archive",
        "archive_too_large", "missing_extra", "base_changed",
    }
)  # fmt: skip
OTHER_REASON = "other"


class Series(NamedTuple):
    """One metric family. ``name`` is the full exposition name."""

    name: str
    type: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


JOBS_SUBMITTED = Series(
    "llamahome_jobs_submitted_total", "counter", "Jobs accepted, by how they came.", ("kind",)
)
JOBS_FINISHED = Series(
    "llamahome_jobs_finished_total", "counter", "Jobs ended, by outcome and error code.",
    ("outcome", "reason"),
)  # fmt: skip
JOBS = Series("llamahome_jobs", "gauge", "Jobs in each state.", ("state",))
RUNS_READY = Series(
    "llamahome_runs_ready", "gauge", "Runs ready to be claimed: the backlog of a queue.", ("queue",)
)
RUNS_UNRUNG = Series(
    "llamahome_runs_unrung", "gauge", "Ready runs for which no doorbell was tried lately.",
    ("queue",),
)  # fmt: skip
OLDEST_QUEUED = Series(
    "llamahome_oldest_queued_job_timestamp_seconds", "gauge",
    "Since when the oldest ready run of a stage waits; absent when none does.", ("stage",),
)  # fmt: skip
LEASES_EXPIRED = Series(
    "llamahome_jobs_lease_expired", "gauge", "Runs whose lease ran out and is not taken back yet.",
    ("stage",),
)  # fmt: skip
STAGE_ATTEMPTS = Series(
    "llamahome_stage_attempts_total", "counter", "Attempts ended, by stage and outcome.",
    ("stage", "outcome"),
)  # fmt: skip
QUEUE_MESSAGES = Series(
    "llamahome_queue_messages", "gauge", "Messages waiting in the broker.", ("queue",)
)
QUEUE_CONSUMER_SLOTS = Series(
    "llamahome_queue_consumer_slots", "gauge", "Slots of live workers on a queue.", ("queue",)
)
BROKER_UP = Series("llamahome_broker_up", "gauge", "1 while the broker answers.")
WORKERS = Series("llamahome_workers", "gauge", "Processes of the fleet.", ("role", "state"))
WORKER_HEARTBEAT = Series(
    "llamahome_worker_heartbeat_timestamp_seconds", "gauge", "Last heartbeat of a process.",
    ("worker", "role"),
)  # fmt: skip
WORKER_INFO = Series(
    "llamahome_worker_info",
    "gauge",
    "1; what a process is.",
    ("worker", "role", "version", "python"),
)
EXPORTER_SECONDS = Series(
    "llamahome_exporter_collect_duration_seconds", "gauge", "How long reading the ledger took."
)

CATALOGUE: tuple[Series, ...] = (
    JOBS_SUBMITTED,
    JOBS_FINISHED,
    JOBS,
    RUNS_READY,
    RUNS_UNRUNG,
    OLDEST_QUEUED,
    LEASES_EXPIRED,
    STAGE_ATTEMPTS,
    QUEUE_MESSAGES,
    QUEUE_CONSUMER_SLOTS,
    BROKER_UP,
    WORKERS,
    WORKER_HEARTBEAT,
    WORKER_INFO,
    EXPORTER_SECONDS,
)


def reason_label(code: str | None) -> str:
    """An error code as a label value, from a closed set."""
    return code if code in REASONS and code is not None else OTHER_REASON if code else ""
