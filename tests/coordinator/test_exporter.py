"""What the exporter says equals what the ledger holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from llamahome.config import Settings, load_settings
from llamahome.coordinator.exporter import FleetCollector, targets_page
from llamahome.ledger import Ledger
from llamahome.schemas import BaseRef, FileRef, JobSpec, Stage
from support.runs import finish_stage


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(state=tmp_path)


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    opened = Ledger(settings.ledger)
    opened.upgrade()
    yield opened
    opened.close()


@pytest.fixture
def spec() -> JobSpec:
    file = FileRef(id="f", filename="a.jsonl", path="uploads/t/a", sha256="a" * 64, bytes=1)
    base = BaseRef(name="tiny", path="/b", digest="b" * 64)
    return JobSpec(tenant="t", base=base, training_files=(file,), config={}, shard_bytes=10)


def _page(ledger: Ledger, settings: Settings) -> str:
    registry = CollectorRegistry()
    registry.register(FleetCollector(ledger, settings))
    return generate_latest(registry).decode()


def test_counts_come_from_the_records_and_a_missing_broker_is_a_zero(
    ledger: Ledger, settings: Settings, spec: JobSpec
) -> None:
    ledger.submit(spec)
    finish_stage(ledger, Stage.validation)
    page = _page(ledger, settings)
    for line in (
        'llamahome_jobs_submitted_total{kind="http"} 1.0',
        'llamahome_jobs{state="preparing"} 1.0',
        'llamahome_jobs{state="failed"} 0.0',
        'llamahome_runs_ready{queue="llamahome.preprocessing"} 2.0',
        'llamahome_stage_attempts_total{outcome="succeeded",stage="validation"} 2.0',
        'llamahome_queue_consumer_slots{queue="llamahome.training"} 0.0',
        "llamahome_broker_up 0.0",
    ):
        assert line in page.splitlines()
    assert "llamahome_queue_messages{" not in page


def test_live_slots_are_counted_per_queue_and_targets_named(
    ledger: Ledger, settings: Settings
) -> None:
    for number in range(2):
        ledger.heartbeat(
            f"w{number}", role="preprocessing", host="node", pid=number, state="up", version="1",
            slots=1, metrics_port=9000 + number, info={"main_metrics_port": 8000},
        )  # fmt: skip
    page = _page(ledger, settings)
    assert 'llamahome_queue_consumer_slots{queue="llamahome.preprocessing"} 2.0' in page
    assert 'llamahome_workers{role="preprocessing",state="up"} 2.0' in page
    kind, body = targets_page(ledger)()
    assert kind == "application/json"
    groups = json.loads(body)
    assert groups[0] == {
        "targets": ["node:8000", "node:9000"], "labels": {"role": "preprocessing"},
    }  # fmt: skip
