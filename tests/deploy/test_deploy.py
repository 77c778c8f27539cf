"""What deploy/ and docker-compose.yml name exists: commands, settings, metrics, files, targets."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from llamahome.cli.app import app
from llamahome.config import Settings
from llamahome.metrics.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
GPU_OVERRIDE = ROOT / "deploy/compose.gpu.yml"
ENV_EXAMPLE = ROOT / "deploy/env.example"
DOCKERFILE = ROOT / "deploy/images/Dockerfile"
PROMETHEUS = ROOT / "deploy/prometheus"
GENERATOR = ROOT / "deploy/grafana/dashboards.py"
DASHBOARDS = ROOT / "deploy/grafana/dashboards"
PROVISIONING = ROOT / "deploy/grafana/provisioning"
RUNBOOKS = ROOT / "docs/runbooks"

ALERTS = {
    "ExporterDown",
    "BrokerDown",
    "QueueWithoutConsumers",
    "JobsWaitTooLong",
    "WorkerLost",
    "StageFailureRatioHigh",
    "OrphanedJobs",
}
# ${NAME}, ${NAME:-default} and ${NAME:?message}, as Compose reads them.
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::([-?])([^}]*))?\}")
METRIC = re.compile(r"\bllamahome_[a-z0-9_]+\b")
RECORD = re.compile(r"\bllamahome:[a-z0-9_:]+\b")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(COMPOSE)["services"]
    return found


def with_defaults(word: str) -> str:
    """A word of the compose file as Compose gives it to a process when .env sets nothing."""
    return VARIABLE.sub(lambda match: match[3] if match[2] == "-" else "", word)


def seconds(duration: str) -> int:
    number, unit = int(duration[:-1]), duration[-1]
    return number * {"s": 1, "m": 60}[unit]


def cli_problem(words: Sequence[str]) -> str | None:
    """Why `llamahome WORDS` is no command line of the CLI, or None. Parses it and runs nothing."""
    command: Any = typer.main.get_command(app)
    path, rest = "llamahome", list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        path, command = f"{path} {rest[0]}", command.commands[rest.pop(0)]
    if rest and hasattr(command, "commands"):
        return f"`{path}` has no command {rest[0]!r}"
    try:
        command.make_context(path, rest)
    except Exception as error:
        # A usage error; its class is click's or Typer's own copy of it, by Typer's version.
        if not hasattr(error, "format_message"):
            raise
        return f"`{path}`: {error.format_message()}"
    return None


def llamahome_commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words after `llamahome`) of everything that the compose file runs."""
    for name, service in services().items():
        for key, line in (
            ("command", service.get("command", [])),
            ("healthcheck", service.get("healthcheck", {}).get("test", [])),
        ):
            words = [with_defaults(word) for word in line if word != "CMD"]
            if words[:1] == ["llamahome"]:
                yield f"{name} {key}", words[1:]


def runbook_commands() -> Iterator[tuple[str, list[str]]]:
    """(file, words after `llamahome`) of every command that a runbook tells to run."""
    for path in sorted(RUNBOOKS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`([^`\n]+)`", text)
        for line in [*"".join(blocks).splitlines(), *inline]:
            match = re.match(r"(?:docker compose exec [a-z-]+ )?llamahome (.*)", line)
            if match:
                yield path.name, shlex.split(match[1])


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(PROMETHEUS / "rules.yml")["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard_panels() -> Iterator[dict[str, Any]]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        yield from json.loads(path.read_text(encoding="utf-8"))["panels"]


def expressions() -> list[str]:
    """Every PromQL expression of the rules, their tests and the dashboards."""
    tests = load(PROMETHEUS / "rules.test.yml")["tests"]
    return [
        *(rule["expr"] for rule in rules()),
        *(series["series"] for test in tests for series in test["input_series"]),
        *(each["expr"] for test in tests for each in test.get("promql_expr_test", [])),
        *(target["expr"] for panel in dashboard_panels() for target in panel.get("targets", [])),
    ]


def is_one_shot(service: Mapping[str, Any]) -> bool:
    return service.get("restart") == "no"


# Compose


def test_every_service_has_an_image_and_a_health_check_or_ends_by_itself() -> None:
    for name, service in services().items():
        assert service.get("image"), f"{name} has no image"
        if is_one_shot(service):
            assert "healthcheck" not in service, f"{name} ends; nothing asks for its health"
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])


def test_an_image_of_ours_is_built_by_one_service_from_a_target_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), flags=re.MULTILINE))
    built = {name: service for name, service in services().items() if "build" in service}
    for name, service in built.items():
        assert (ROOT / service["build"]["dockerfile"]).samefile(DOCKERFILE), name
        assert service["build"]["target"] in targets, name
    images = [service["image"] for service in built.values()]
    assert len(images) == len(set(images))
    ours = {s["image"] for s in services().values() if s["image"].startswith("llamahome")}
    assert ours == set(images)


def test_the_images_of_others_are_pinned() -> None:
    for name, service in services().items():
        if not service["image"].startswith("llamahome"):
            assert re.search(r":v?\d", service["image"]), f"{name}: {service['image']}"


@pytest.mark.parametrize(
    ("where", "words"), [pytest.param(*each, id=each[0]) for each in llamahome_commands()]
)
def test_a_command_of_the_compose_file_exists(where: str, words: list[str]) -> None:
    assert cli_problem(words) is None, where


def test_a_command_line_with_a_wrong_name_is_seen() -> None:
    assert cli_problem(["worker", "evaluation"]) is not None
    assert cli_problem(["worker", "validation", "--threads", "2"]) is not None
    assert cli_problem(["worker"]) is not None
    assert cli_problem(["coordinate"]) is not None
    assert cli_problem(["ledger", "downgrade"]) is not None


def test_each_part_of_the_fleet_runs_once_in_the_compose_file() -> None:
    found = [words for where, words in llamahome_commands() if where.endswith("command")]
    heads = sorted(
        " ".join(words[: 2 if words[0] in ("worker", "ledger") else 1]) for words in found
    )
    assert heads == [
        "coordinator",
        "gateway",
        "ledger upgrade",
        "worker preprocessing",
        "worker submissions",
        "worker training",
        "worker validation",
    ]


def test_the_processes_wait_for_the_migration_and_for_nothing_that_may_be_away() -> None:
    for name, service in services().items():
        if not service["image"].startswith("llamahome") or is_one_shot(service):
            continue
        conditions = {k: v["condition"] for k, v in service["depends_on"].items()}
        assert conditions["migrate"] == "service_completed_successfully", name
        assert conditions["postgres"] == "service_healthy", name
        assert conditions["redis"] == "service_started", name


def test_the_environment_of_a_process_is_made_of_settings() -> None:
    known = {f"LLAMAHOME_{field.upper()}" for field in Settings.model_fields}
    for name, service in services().items():
        given = {key for key in service.get("environment", {}) if key.startswith("LLAMAHOME_")}
        assert given <= known, f"{name}: {sorted(given - known)}"


def test_a_process_is_killed_only_after_its_drain_has_ended() -> None:
    default = Settings.model_fields["drain_seconds"].default
    for name, service in services().items():
        if service["image"].startswith("llamahome") and not is_one_shot(service):
            drain = float(service["environment"].get("LLAMAHOME_DRAIN_SECONDS", default))
            assert drain < seconds(service["stop_grace_period"]), name


def test_every_process_of_ours_sees_the_same_storage_and_the_bases_read_only() -> None:
    for name, service in services().items():
        if service["image"].startswith("llamahome"):
            mounts = [with_defaults(mount) for mount in service["volumes"]]
            assert "storage:/var/lib/llamahome/storage" in mounts, name
            assert "bases:/var/lib/llamahome/bases:ro" in mounts, name


def test_named_volumes_and_networks_are_declared_and_mounted_files_exist() -> None:
    compose = load(COMPOSE)
    for name, service in services().items():
        assert set(service.get("networks", [])) <= set(compose["networks"]), name
        for mount in service.get("volumes", []):
            source = with_defaults(mount).split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), f"{name}: {source}"
            elif not source.startswith("/"):
                assert source in compose["volumes"], f"{name}: {source}"


def test_redis_refuses_instead_of_evicting_and_neither_store_is_published() -> None:
    command = [with_defaults(word) for word in services()["redis"]["command"]]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory"]
    assert "ports" not in services()["redis"]
    assert "ports" not in services()["postgres"]


def test_published_ports_are_those_of_this_machine_alone() -> None:
    for name, service in services().items():
        for port in service.get("ports", []):
            assert with_defaults(port).startswith("127.0.0.1:"), f"{name}: {port}"


def test_passwords_come_from_the_environment_and_have_no_default() -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    used = {name: kind for name, kind, _ in VARIABLE.findall(text) if "PASSWORD" in name}
    assert used == {"POSTGRES_PASSWORD": "?", "GRAFANA_ADMIN_PASSWORD": "?"}
    for name, service in services().items():
        for key, value in service.get("environment", {}).items():
            if "PASSWORD" in key:
                assert VARIABLE.fullmatch(value), f"{name}: {key} is written out"


def test_the_example_environment_has_every_variable_and_no_secret() -> None:
    used = set()
    for path in (COMPOSE, GPU_OVERRIDE):
        used |= {name for name, _, _ in VARIABLE.findall(path.read_text(encoding="utf-8"))}
    lines = ENV_EXAMPLE.read_text(encoding="utf-8").splitlines()
    offered = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", "\n".join(lines), flags=re.MULTILINE))
    # COMPOSE_FILE is read by Compose itself.
    assert offered.keys() - {"COMPOSE_FILE"} == used
    assert {line for line in lines if line and not line.startswith("#")} == {
        "POSTGRES_PASSWORD=",
        "GRAFANA_ADMIN_PASSWORD=",
    }
    # An exported LLAMAHOME_ variable that is no setting stops every llamahome command.
    assert not [name for name in offered if name.startswith("LLAMAHOME_")]


def test_the_defaults_in_the_example_environment_are_those_of_the_compose_files() -> None:
    offered = dict(
        re.findall(r"^#([A-Z_]+)=(.*)$", ENV_EXAMPLE.read_text("utf-8"), flags=re.MULTILINE)
    )
    for path in (COMPOSE, GPU_OVERRIDE):
        for name, kind, default in VARIABLE.findall(path.read_text(encoding="utf-8")):
            if kind == "-":
                assert offered[name] == default, name


def test_the_gpu_override_touches_the_training_worker_alone() -> None:
    override = load(GPU_OVERRIDE)["services"]
    assert set(override) == {"worker-training"} <= set(services())
    devices = override["worker-training"]["deploy"]["resources"]["reservations"]["devices"]
    assert [(device["driver"], device["capabilities"]) for device in devices] == [
        ("nvidia", ["gpu"])
    ]


# Images


def test_the_build_context_has_what_the_dockerfile_copies_and_nothing_else() -> None:
    copied = set()
    for line in DOCKERFILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            copied |= set(line.split()[1:-1])
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    for name in copied:
        assert (ROOT / name).exists(), name


def test_the_images_run_as_an_unprivileged_user() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE):
        if stage.startswith(("base AS light\n", "base AS training\n")):
            assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stage, flags=re.MULTILINE)


# Prometheus


def test_prometheus_finds_the_processes_through_the_coordinator() -> None:
    config = load(PROMETHEUS / "prometheus.yml")
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["llamahome"]["http_sd_configs"] == [
        {"url": "http://coordinator:9100/sd", "refresh_interval": "15s"}
    ]
    # Without it a target's own `worker` label would rename that of the series.
    assert jobs["llamahome"]["honor_labels"] is True
    assert jobs["prometheus"]["static_configs"] == [{"targets": ["127.0.0.1:9090"]}]
    assert [path for path in config["rule_files"] if not (PROMETHEUS / path).exists()] == []


def test_every_metric_named_is_in_the_catalogue() -> None:
    known = {series.name for series in CATALOGUE}
    named = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert named <= known, sorted(named - known)
    assert named


def test_every_recorded_series_that_is_named_is_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = {name for expression in expressions() for name in RECORD.findall(expression)}
    assert named == recorded


def test_every_alert_has_a_severity_a_summary_and_a_runbook_of_its_name() -> None:
    assert alerts().keys() == ALERTS
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["for"], name
        assert rule["annotations"]["summary"], name
        assert rule["annotations"]["runbook"] == f"docs/runbooks/{name}.md"
        heading = (ROOT / rule["annotations"]["runbook"]).read_text("utf-8").splitlines()[0]
        assert heading == f"# {name}"
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == ALERTS


def test_every_alert_has_a_firing_and_a_silent_case() -> None:
    firing, silent = set(), set()
    for test in load(PROMETHEUS / "rules.test.yml")["tests"]:
        cases = test.get("alert_rule_test", [])
        fired = {case["alertname"] for case in cases if case["exp_alerts"]}
        firing |= fired
        # A case before the alert's time in a firing test does not count as the silent one.
        silent |= {case["alertname"] for case in cases} - fired
    assert firing == ALERTS
    assert silent == ALERTS


@pytest.mark.parametrize(
    ("file", "words"),
    [pytest.param(*each, id=f"{each[0]}: {' '.join(each[1])}") for each in runbook_commands()],
)
def test_a_command_of_a_runbook_exists(file: str, words: list[str]) -> None:
    assert cli_problem(words) is None, file


def test_a_runbook_names_services_of_the_compose_file() -> None:
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"\bworker-[a-z]+", text))
        named |= set(re.findall(r"docker compose exec ([a-z-]+)", text))
        assert named <= set(services()), path.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules.yml"],
        ["test", "rules", "rules.test.yml"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_finds_nothing_wrong(arguments: list[str]) -> None:
    ran = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# Grafana


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GENERATOR), *arguments], capture_output=True, text=True, check=False
    )


def test_the_committed_dashboards_are_what_the_generator_writes(tmp_path: Path) -> None:
    ran = generate("--check")
    assert ran.returncode == 0, ran.stderr
    assert generate("--dir", str(tmp_path)).returncode == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in DASHBOARDS.iterdir()}


def test_the_generators_check_sees_a_changed_a_missing_and_a_foreign_file(tmp_path: Path) -> None:
    generate("--dir", str(tmp_path))
    assert generate("--check", "--dir", str(tmp_path)).returncode == 0
    fleet = tmp_path / "fleet.json"
    text = fleet.read_text(encoding="utf-8")
    fleet.write_text(text.replace("llamahome_broker_up", "up"), encoding="utf-8")
    assert generate("--check", "--dir", str(tmp_path)).returncode == 1
    fleet.unlink()
    assert generate("--check", "--dir", str(tmp_path)).returncode == 1
    generate("--dir", str(tmp_path))
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert generate("--check", "--dir", str(tmp_path)).returncode == 1


def test_panels_have_unique_ids_and_titles_and_do_not_overlap() -> None:
    panels = list(dashboard_panels())
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    titles = [panel["title"] for panel in panels]
    assert len(titles) == len(set(titles))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_asks_the_provisioned_datasource() -> None:
    datasources = load(PROVISIONING / "datasources/prometheus.yml")["datasources"]
    uids = {source["uid"] for source in datasources}
    for panel in dashboard_panels():
        for each in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert each["datasource"]["uid"] in uids, panel["title"]


def test_grafana_reads_the_dashboards_from_where_they_are_mounted() -> None:
    providers = load(PROVISIONING / "dashboards/llamahome.yml")["providers"]
    grafana = services()["grafana"]
    targets = {mount.split(":")[1]: mount.split(":")[0] for mount in grafana["volumes"]}
    for provider in providers:
        assert (ROOT / targets[provider["options"]["path"]]).samefile(DASHBOARDS)
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / targets[str(home.parent)] / home.name).exists()
