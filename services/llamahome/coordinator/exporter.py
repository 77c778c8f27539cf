"""The fleet's numbers at scrape time: durable ones from the ledger, the broker's beside them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator

import redis
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from llamahome.config import Settings
from llamahome.ledger import Ledger
from llamahome.metrics import catalogue, family, reason_label
from llamahome.queueing.app import redis_client
from llamahome.queueing.names import ALL_QUEUES, queue_name
from llamahome.schemas import Stage, Worker

# Roles that consume a stage's queue carry the stage's name; this one has a queue of its own.
_SUBMISSIONS_ROLE = "submissions"


class FleetCollector(Collector):
    """Stateless: two copies answer the same, and a restart forgets nothing."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._redis = redis_client(settings)

    def collect(self) -> Iterator[Metric]:
        """Raises Unavailable when the ledger does not answer: the scrape fails, as it should."""
        began = time.perf_counter()
        yield from self._ledger_families()
        yield from self._worker_families(self._ledger.workers())
        yield from self._broker_families()
        yield family(catalogue.EXPORTER_SECONDS, [((), time.perf_counter() - began)])

    def describe(self) -> list[Metric]:
        """Named in advance, so that registering does not need the ledger."""
        return []

    def _ledger_families(self) -> Iterator[Metric]:
        facts = self._ledger.facts(unrung_seconds=2 * self._settings.rering_seconds)
        yield family(catalogue.JOBS_SUBMITTED, _one_label(facts.submitted))
        finished: Counter[tuple[str, str]] = Counter()
        for (state, code), number in facts.finished.items():
            finished[str(state), reason_label(code)] += number
        yield family(catalogue.JOBS_FINISHED, [(key, float(n)) for key, n in finished.items()])
        yield family(catalogue.JOBS, _one_label(facts.jobs))
        yield family(catalogue.RUNS_READY, _by_queue(facts.runs_ready))
        yield family(catalogue.RUNS_UNRUNG, _by_queue(facts.runs_unrung))
        yield family(catalogue.OLDEST_QUEUED, _one_label(facts.oldest_ready_at))
        yield family(catalogue.LEASES_EXPIRED, _one_label(facts.leases_expired))
        attempts = [((str(s), str(o)), float(n)) for (s, o), n in facts.attempts.items()]
        yield family(catalogue.STAGE_ATTEMPTS, attempts)

    def _worker_families(self, workers: list[Worker]) -> Iterator[Metric]:
        states = Counter((worker.role, worker.state) for worker in workers)
        yield family(catalogue.WORKERS, [(key, float(n)) for key, n in states.items()])
        yield family(
            catalogue.WORKER_HEARTBEAT,
            [((worker.id, worker.role), worker.heartbeat_at) for worker in workers],
        )
        slots: dict[str, float] = {_queue_of(role): 0.0 for role in (*Stage, _SUBMISSIONS_ROLE)}
        for worker in workers:
            queue = _queue_of(worker.role)
            if queue in slots and worker.state not in ("lost", "draining"):
                slots[queue] += worker.slots
        yield family(catalogue.QUEUE_CONSUMER_SLOTS, [((q,), n) for q, n in slots.items()])

    def _broker_families(self) -> Iterator[Metric]:
        try:
            lengths = {name: float(self._redis.llen(name)) for name in ALL_QUEUES}
        except redis.RedisError:
            # A broker that is down is a fact to be exported, not an error of the exporter.
            yield family(catalogue.BROKER_UP, [((), 0.0)])
            return
        yield family(catalogue.BROKER_UP, [((), 1.0)])
        yield family(catalogue.QUEUE_MESSAGES, [((q,), n) for q, n in lengths.items()])


def targets_page(ledger: Ledger) -> Callable[[], tuple[str, bytes]]:
    """Prometheus http_sd: every live process's metrics port.

    Format: prometheus.io, "HTTP SD", a list of {targets, labels}.
    """

    def page() -> tuple[str, bytes]:
        groups = []
        for worker in ledger.workers(alive_only=True):
            ports = {worker.metrics_port, worker.info.get("main_metrics_port")} - {None}
            targets = sorted(f"{worker.host}:{port}" for port in ports)
            groups.append({"targets": targets, "labels": {"role": worker.role}})
        return "application/json", json.dumps(groups).encode()

    return page


def _queue_of(role: str) -> str:
    return queue_name(Stage(role)) if role in Stage.__members__ else f"llamahome.{role}"


def _one_label(counts: dict[str, int] | dict[str, float]) -> list[tuple[tuple[str, ...], float]]:
    return [((str(label),), float(value)) for label, value in counts.items()]


def _by_queue(counts: dict[str, int]) -> list[tuple[tuple[str, ...], float]]:
    return [((queue_name(Stage(stage)),), float(n)) for stage, n in counts.items()]
