"""Writes the Grafana dashboards that are committed beside it.

    python deploy/grafana/dashboards.py            write deploy/grafana/dashboards/*.json
    python deploy/grafana/dashboards.py --check    exit 1 if a file is not what would be written

A panel names only series of llamahome.metrics.catalogue and records of deploy/prometheus/rules.yml.
Each coordinator exports the same ledger, so expressions take `max by` and never add replicas up.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DASHBOARDS_DIR = Path(__file__).resolve().parent / "dashboards"
# The uid of provisioning/datasources/prometheus.yml.
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
# Grafana's grid is 24 columns wide; heights are in its row units.
GRID_COLUMNS = 24
STAT_HEIGHT = 4
PANEL_HEIGHT = 8

Json = dict[str, Any]

GREEN, YELLOW, RED = "green", "yellow", "red"


def target(expr: str, legend: str = "", *, instant: bool = False, table: bool = False) -> Json:
    """One query; `legend` is Grafana's template over the labels of a series."""
    return {
        "datasource": DATASOURCE,
        "expr": expr,
        "legendFormat": legend or "__auto",
        "instant": instant,
        "range": not instant,
        "format": "table" if table else "time_series",
    }


def thresholds(*steps: tuple[float | None, str]) -> Json:
    """Steps of (lower bound, colour); the first bound is None, which is minus infinity."""
    return {
        "mode": "absolute",
        "steps": [{"value": value, "color": color} for value, color in steps],
    }


def panel(
    kind: str, title: str, description: str, width: int, height: int, targets: Sequence[Json]
) -> Json:
    """What panels of every kind have; layout() gives the id and the place."""
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": [{**each, "refId": chr(ord("A") + index)} for index, each in enumerate(targets)],
    }


def stat(
    title: str,
    description: str,
    expr: str,
    *,
    unit: str = "none",
    steps: Json | None = None,
    texts: dict[str, str] | None = None,
    empty: str = "0",
) -> Json:
    """One number of now; `texts` shows words for values, `empty` stands where no series is."""
    options = {value: {"text": text} for value, text in (texts or {}).items()}
    defaults = {
        "unit": unit,
        "noValue": empty,
        "color": {"mode": "thresholds"},
        "thresholds": steps or thresholds((None, GREEN)),
        "mappings": [{"type": "value", "options": options}] if options else [],
    }
    return {
        **panel("stat", title, description, 4, STAT_HEIGHT, [target(expr, instant=True)]),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "value",
        },
    }


def graph(
    title: str,
    description: str,
    targets: Sequence[Json],
    *,
    unit: str = "short",
    width: int = 8,
    stacked: bool = False,
    limit: float | None = None,
) -> Json:
    """Lines over time from zero up; `limit` draws the line at which an alert begins to count."""
    custom: Json = {
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    defaults: Json = {"unit": unit, "min": 0, "custom": custom}
    if limit is not None:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["thresholds"] = thresholds((None, "transparent"), (limit, RED))
    return {
        **panel("timeseries", title, description, width, PANEL_HEIGHT, targets),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def bars(title: str, description: str, expr: str, legend: str) -> Json:
    """One bar for each series, over the range that the dashboard shows."""
    return {
        **panel(
            "bargauge", title, description, 8, PANEL_HEIGHT, [target(expr, legend, instant=True)]
        ),
        "fieldConfig": {
            "defaults": {
                "unit": "short",
                "decimals": 0,
                "min": 0,
                "color": {"mode": "fixed", "fixedColor": RED},
                "noValue": "none",
            },
            "overrides": [],
        },
        "options": {
            "displayMode": "basic",
            "orientation": "horizontal",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showUnfilled": True,
            "valueMode": "color",
        },
    }


def heartbeat_table() -> Json:
    """The processes with the age of their last heartbeat, the oldest first."""
    expr = "time() - max by (worker, role) (llamahome_worker_heartbeat_timestamp_seconds)"
    age = {
        "matcher": {"id": "byName", "options": "Heartbeat age"},
        "properties": [
            {"id": "unit", "value": "s"},
            {"id": "decimals", "value": 0},
            {"id": "thresholds", "value": thresholds((None, GREEN), (15, YELLOW), (30, RED))},
            {"id": "custom.cellOptions", "value": {"type": "color-text"}},
        ],
    }
    return {
        **panel(
            "table",
            "Heartbeats",
            "Seconds since each process's last heartbeat. Over 30 s for a minute: WorkerLost.",
            8,
            PANEL_HEIGHT,
            [target(expr, instant=True, table=True)],
        ),
        "fieldConfig": {"defaults": {}, "overrides": [age]},
        "options": {
            "showHeader": True,
            "sortBy": [{"displayName": "Heartbeat age", "desc": True}],
        },
        "transformations": [
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True},
                    "indexByName": {"role": 0, "worker": 1, "Value": 2},
                    "renameByName": {"role": "Role", "worker": "Process", "Value": "Heartbeat age"},
                },
            }
        ],
    }


def now_row() -> list[Json]:
    waiting = "accepted|validating|preparing|queued"
    of_workers = "role!~'gateway|coordinator'"
    return [
        stat(
            "Jobs training",
            "Jobs in the state running.",
            'max(llamahome_jobs{state="running"})',
        ),
        stat(
            "Jobs on their way",
            "Jobs accepted and not yet training: accepted, validating, preparing, queued.",
            f'sum(max by (state) (llamahome_jobs{{state=~"{waiting}"}}))',
        ),
        stat(
            "Oldest waiting",
            "Age of the oldest job that waits for a stage. Over 30 min: JobsWaitTooLong.",
            "max(llamahome:oldest_queued_job:age_seconds)",
            unit="s",
            steps=thresholds((None, GREEN), (600, YELLOW), (1800, RED)),
            empty="nothing waits",
        ),
        stat(
            "Workers up",
            "Workers with a fresh heartbeat, busy ones included; not gateways and coordinators.",
            f"sum(max by (role, state) (llamahome_workers{{{of_workers},state=~'up|busy'}}))",
            steps=thresholds((None, RED), (1, GREEN)),
        ),
        stat(
            "Workers lost",
            "Workers whose heartbeat stopped without a farewell, for a day. The first hour of it:"
            " WorkerLost.",
            f"sum(max by (role, state) (llamahome_workers{{{of_workers},state='lost'}}))",
            steps=thresholds((None, GREEN), (1, RED)),
        ),
        stat(
            "Redis",
            "Whether the coordinators reach the broker.",
            "max(llamahome_broker_up)",
            steps=thresholds((None, RED), (1, GREEN)),
            texts={"0": "down", "1": "up"},
            empty="unknown",
        ),
    ]


def jobs_row() -> list[Json]:
    submitted = "60 * sum(max by (kind) (rate(llamahome_jobs_submitted_total[$__rate_interval])))"
    finished = (
        "60 * sum by (outcome) (max by (outcome, reason)"
        " (rate(llamahome_jobs_finished_total[$__rate_interval])))"
    )
    failures = (
        "sort_desc(sum by (reason) (max by (outcome, reason)"
        ' (increase(llamahome_jobs_finished_total{outcome="failed"}[$__range]))) > 0)'
    )
    return [
        graph(
            "Jobs by state",
            "Jobs that have not ended.",
            [
                target(
                    'max by (state) (llamahome_jobs{state!~"succeeded|failed|cancelled"})',
                    "{{state}}",
                )
            ],
            stacked=True,
        ),
        graph(
            "Jobs a minute",
            "Accepted, and ended by outcome.",
            [target(submitted, "submitted"), target(finished, "{{outcome}}")],
        ),
        bars("Failures by reason", "Failed jobs of the range shown.", failures, "{{reason}}"),
    ]


def queues_row() -> list[Json]:
    return [
        graph(
            "Ready runs",
            "The backlog, counted in the ledger: runs that a worker could claim now.",
            [target("max by (queue) (llamahome_runs_ready)", "{{queue}}")],
        ),
        graph(
            "Ready runs for each slot",
            "1 = one waiting run for each slot. No line where a queue has no slot.",
            [target("llamahome:queue_saturation:ratio", "{{queue}}")],
        ),
        graph(
            "Oldest waiting by stage",
            "Age of the oldest job that waits for each stage; the line is JobsWaitTooLong's.",
            [target("llamahome:oldest_queued_job:age_seconds", "{{stage}}")],
            unit="s",
            limit=1800,
        ),
        graph(
            "Slots",
            "Runs that the live workers of a queue can hold at once. Ready runs and no slot for"
            " five minutes: QueueWithoutConsumers.",
            [target("max by (queue) (llamahome_queue_consumer_slots)", "{{queue}}")],
        ),
        graph(
            "Messages in Redis",
            "Doorbells, short by design; only in llamahome.submissions are they work.",
            [target("max by (queue) (llamahome_queue_messages)", "{{queue}}")],
        ),
        graph(
            "Work that belongs to nobody",
            "Ready runs whose doorbell is overdue and leases that ran out. The sweeper repairs both"
            " within seconds; five minutes of it: OrphanedJobs.",
            [
                target("max by (queue) (llamahome_runs_unrung)", "unrung {{queue}}"),
                target("max by (stage) (llamahome_jobs_lease_expired)", "expired {{stage}}"),
            ],
        ),
    ]


def stages_row() -> list[Json]:
    return [
        graph(
            "Attempts a minute",
            "Ended attempts by stage and outcome.",
            [target("60 * llamahome:stage_attempts:rate5m > 0", "{{stage}} {{outcome}}")],
            width=12,
        ),
        graph(
            "Failing share of attempts",
            "Failed, retried and lost over all but cancelled, five minutes. Over a tenth of ten or"
            " more: StageFailureRatioHigh.",
            [target("llamahome:stage_failure:ratio_rate5m", "{{stage}}")],
            unit="percentunit",
            width=12,
            limit=0.1,
        ),
    ]


def processes_row() -> list[Json]:
    return [
        graph(
            "Processes by role and state",
            "Workers, gateways and coordinators.",
            [target("max by (role, state) (llamahome_workers) > 0", "{{role}} {{state}}")],
            stacked=True,
        ),
        heartbeat_table(),
        graph(
            "Time to collect",
            "How long a coordinator takes to read the ledger and Redis for one scrape; the scrape"
            " gives up after 10 s.",
            [target("llamahome_exporter_collect_duration_seconds", "{{instance}}")],
            unit="s",
        ),
    ]


def layout(rows: Sequence[tuple[str, list[Json]]]) -> list[Json]:
    """Panels in order with ids from 1, left to right, wrapped at the grid's width."""
    placed: list[Json] = []
    top = 0
    for title, panels in rows:
        heading = {"type": "row", "title": title, "collapsed": False, "panels": []}
        placed.append({**heading, "gridPos": {"x": 0, "y": top, "w": GRID_COLUMNS, "h": 1}})
        top += 1
        left, line_height = 0, 0
        for each in panels:
            size = each["gridPos"]
            if left + size["w"] > GRID_COLUMNS:
                top, left, line_height = top + line_height, 0, 0
            placed.append({**each, "gridPos": {"x": left, "y": top, **size}})
            left, line_height = left + size["w"], max(line_height, size["h"])
        top += line_height
    return [{"id": number, **each} for number, each in enumerate(placed, start=1)]


def fleet() -> Json:
    rows = [
        ("Now", now_row()),
        ("Jobs", jobs_row()),
        ("Queues", queues_row()),
        ("Stages", stages_row()),
        ("Processes", processes_row()),
    ]
    return {
        "uid": "llamahome-fleet",
        "title": "LlamaHome fleet",
        "description": "Jobs, queues, stages and workers, from the ledger.",
        "tags": ["llamahome"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": []},
        "links": [],
        "panels": layout(rows),
    }


def render(dashboard: Json) -> str:
    return json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"


def dashboards() -> dict[str, str]:
    """File name -> contents."""
    return {"fleet.json": render(fleet())}


def stale_files(folder: Path) -> list[str]:
    """Names that are missing from `folder`, that differ there, or that are no longer generated."""
    wanted = dashboards()
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the Grafana dashboards.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--dir", type=Path, default=DASHBOARDS_DIR, help="where the files are")
    options = parser.parse_args(arguments)
    if options.check:
        stale = stale_files(options.dir)
        for name in stale:
            print(f"{options.dir / name} is not what {Path(__file__).name} writes", file=sys.stderr)
        return 1 if stale else 0
    options.dir.mkdir(parents=True, exist_ok=True)
    for name, text in dashboards().items():
        (options.dir / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
