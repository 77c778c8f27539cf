"""The catalogue is frozen, and a page serves it."""

from __future__ import annotations

import urllib.request

import pytest

from llamahome.errors import Unavailable
from llamahome.metrics import CATALOGUE, MetricsServer, process_registry, reason_label


def test_the_catalogue_is_frozen() -> None:
    assert [(series.name, series.type, series.labels) for series in CATALOGUE] == [
        ("llamahome_jobs_submitted_total", "counter", ("kind",)),
        ("llamahome_jobs_finished_total", "counter", ("outcome", "reason")),
        ("llamahome_jobs", "gauge", ("state",)),
        ("llamahome_runs_ready", "gauge", ("queue",)),
        ("llamahome_runs_unrung", "gauge", ("queue",)),
        ("llamahome_oldest_queued_job_timestamp_seconds", "gauge", ("stage",)),
        ("llamahome_jobs_lease_expired", "gauge", ("stage",)),
        ("llamahome_stage_attempts_total", "counter", ("stage", "outcome")),
        ("llamahome_queue_messages", "gauge", ("queue",)),
        ("llamahome_queue_consumer_slots", "gauge", ("queue",)),
        ("llamahome_broker_up", "gauge", ()),
        ("llamahome_workers", "gauge", ("role", "state")),
        ("llamahome_worker_heartbeat_timestamp_seconds", "gauge", ("worker", "role")),
        ("llamahome_worker_info", "gauge", ("worker", "role", "version", "python")),
        ("llamahome_exporter_collect_duration_seconds", "gauge", ()),
    ]


def test_names_follow_prometheus_conventions() -> None:
    for series in CATALOGUE:
        assert series.name.startswith("llamahome_")
        assert series.name.endswith("_total") == (series.type == "counter")
        assert series.help.endswith(".")
        assert not {"job", "job_id", "user", "file", "path", "model"} & set(series.labels)


@pytest.mark.parametrize(
    ("code", "label"),
    [("worker_lost", "worker_lost"), ("made_up", "other"), ("", ""), (None, "")],
)
def test_error_codes_become_a_closed_set_of_reasons(code: str | None, label: str) -> None:
    assert reason_label(code) == label


def test_a_page_serves_process_facts_and_extra_pages_on_a_free_port() -> None:
    pages = {"/hello": lambda: ("text/plain", b"hi")}
    with MetricsServer(process_registry(), host="127.0.0.1", port=0, pages=pages) as server:
        base = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{base}/metrics", timeout=5) as answer:
            assert b"process_resident_memory_bytes" in answer.read()
        with urllib.request.urlopen(f"{base}/hello", timeout=5) as answer:
            assert answer.read() == b"hi"
        with pytest.raises(Unavailable, match=f"127.0.0.1:{server.port}"):
            MetricsServer(process_registry(), host="127.0.0.1", port=server.port)
