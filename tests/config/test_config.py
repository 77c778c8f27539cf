"""What to train, where it runs, and which source beats which."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamahome.config import (
    Settings,
    TrainingConfig,
    load_settings,
    parse_assignments,
    private_redis_socket,
    recipes,
    resolve_training_config,
)
from llamahome.errors import InvalidConfig, LlamaHomeError, NotFound
from llamahome.ledger import Ledger
from llamahome.storage import open_storage

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / ".config" / "training_config.yaml"


def _resolve(*layers: dict[str, Any], **more: Any) -> TrainingConfig:
    named = [(f"layer {n}", layer) for n, layer in enumerate(layers)]
    return resolve_training_config(layers=named, environ={}, **more)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may read the repository's own files by being started in it."""
    monkeypatch.chdir(tmp_path)


def test_the_shipped_file_and_the_built_in_defaults_say_the_same() -> None:
    assert resolve_training_config(file=SHIPPED, environ={}) == _resolve()


def test_the_llama_override_changes_what_it_names_and_nothing_else() -> None:
    llama = resolve_training_config(file=SHIPPED, model_name="llama", environ={})
    other = resolve_training_config(file=SHIPPED, model_name="other", environ={})
    assert (llama.batch_size, llama.max_length, llama.lora.r) == (2, 1024, 16)
    assert llama.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (llama.lora.alpha, llama.lora.dropout, llama.epochs) == (32.0, 0.1, 3)
    assert other == _resolve()


def test_later_sources_beat_earlier_ones_and_nothing_passed_in_is_changed() -> None:
    first, second = {"lora": {"r": 4, "alpha": 8}}, {"lora": {"r": 5}}
    config = _resolve(first, second, file=SHIPPED, model_name="llama", recipe="quick")
    assert (config.lora.r, config.lora.alpha) == (5, 8.0)
    assert first == {"lora": {"r": 4, "alpha": 8}}


@pytest.mark.parametrize("text", ["5e-5", '"5e-5"', "1e-4", "0.00005", "5.0e-5"])
def test_a_learning_rate_arrives_as_a_number_however_it_is_written(text: str) -> None:
    value = yaml.safe_load(f"x: {text}")["x"]
    assert _resolve({"learning_rate": value}).learning_rate == float(text.strip('"'))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"validation_split": 1}, "validation_split"),
        ({"validation_split": -0.1}, "validation_split"),
        ({"validation_split": float("nan")}, "validation_split"),
        ({"validation_split": True}, "validation_split"),
        ({"validation_split": "0.1"}, "validation_split"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"batch_size": "4"}, "batch_size"),
        ({"batch_size": 4.0}, "batch_size"),
        ({"fp16": "yes"}, "fp16"),
        ({"max_length": 7}, "max_length"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"dropout": 1}}, "lora.dropout"),
        ({"lora": {"bias": "all"}}, "lora.bias"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["q", "q"]}}, "lora.target_modules"),
        ({"lora": {"target_modules": None}}, "lora.target_modules"),
        ({"lora": {"target_modules": [5]}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["q", ""]}}, "lora.target_modules"),
        ({"lora": {"target_modules": ["\ud800"]}}, "lora.target_modules"),
        ({"lora": {"r": 4097}}, "lora.r"),
        ({"lora": {"alpha": 1_000_001}}, "lora.alpha"),
        ({"lora": {"alpha": 10**400}}, "lora.alpha"),
        ({"lora": None}, "lora"),
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"learning_rate": "1e999"}, "learning_rate"),
        ({"max_length": 10**12}, "max_length"),
        ({"epochs": 16**5000}, "epochs"),
        ({"warmup_steps": 10**400}, "warmup_steps"),
        ({"early_stopping": {"patience": 0}}, "early_stopping.patience"),
        ({"early_stopping": {"min_delta": -1}}, "early_stopping.min_delta"),
    ],
)
def test_a_wrong_value_is_refused_with_its_source_and_field(
    values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        _resolve(values)
    assert caught.value.place.file == "layer 0"
    assert caught.value.place.field == field
    assert len(str(caught.value)) < 300


def test_the_largest_values_that_are_taken() -> None:
    config = _resolve({"max_length": 1024 * 1024, "lora": {"r": 4096, "alpha": 1_000_000}})
    assert (config.max_length, config.lora.r, config.lora.alpha) == (1048576, 4096, 1e6)


def test_a_typo_names_the_nearest_key_also_inside_a_section() -> None:
    with pytest.raises(
        InvalidConfig, match="learning_rat: unknown key. Did you mean 'learning_rate'"
    ):
        _resolve({"learning_rat": 1})
    with pytest.raises(InvalidConfig, match=r"lora\.rank: unknown key"):
        _resolve({"lora": {"rank": 1}})


@pytest.mark.parametrize(
    "content", ["", "# only a comment\n", "training:\n", "training: {}\n", "\ufeff"]
)
def test_a_file_that_says_nothing_means_the_defaults(tmp_path: Path, content: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content, encoding="utf-8")
    assert resolve_training_config(file=file, environ={}) == _resolve()


def test_broken_yaml_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  epochs: [1\n")
    with pytest.raises(InvalidConfig, match=r"c\.yaml:3: broken YAML"):
        resolve_training_config(file=file, environ={})


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.yaml"):
        resolve_training_config(environ={"LLAMAHOME_TRAINING_CONFIG": str(tmp_path / "none.yaml")})


def test_overrides_may_stand_under_training_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  epochs: 2\n  model_configs:\n    m:\n      epochs: 7\n")
    assert resolve_training_config(file=file, model_name="m", environ={}).epochs == 7
    assert resolve_training_config(file=file, environ={}).epochs == 2


def test_the_eval_steps_alias_is_the_key_itself() -> None:
    assert _resolve({"logging": {"steps": 5, "eval_steps": 50}}).eval_steps == 50
    with pytest.raises(InvalidConfig, match=r"eval_steps is 1, logging\.eval_steps is 2"):
        _resolve({"eval_steps": 1, "logging": {"eval_steps": 2}})


def test_the_eval_steps_alias_has_the_place_of_its_own_layer() -> None:
    alias, own = {"logging": {"eval_steps": 50}}, {"eval_steps": 7}
    assert _resolve(alias, own).eval_steps == 7
    assert _resolve(own, alias).eval_steps == 50
    assert _resolve(alias, {"eval_steps": None}).eval_steps is None
    assert _resolve(alias, {"logging": {"steps": 2}}).eval_steps == 50
    with pytest.raises(InvalidConfig, match="layer 1: eval_steps is 1"):
        _resolve(own, {"eval_steps": 1, "logging": {"eval_steps": 2}})


def test_assignments_are_dotted_keys_with_yaml_values() -> None:
    parsed = parse_assignments(["lora.r=16", "lora.target_modules=[q_proj]", "fp16=false"])
    assert parsed == {"lora": {"r": 16, "target_modules": ["q_proj"]}, "fp16": False}
    for bad in ("epochs", "=1"):
        with pytest.raises(InvalidConfig, match="not key=value"):
            parse_assignments([bad])


def test_every_recipe_parses_and_says_what_it_is_for() -> None:
    found = recipes()
    assert "quick" in found
    for name, description in found.items():
        assert description, f"{name} has no first-line description"
        _resolve(recipe=name)


def test_every_file_in_configs_parses() -> None:
    files = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob(".config/*.yaml")]
    assert files
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict | None), file


def test_settings_are_derived_from_the_state_folder(tmp_path: Path) -> None:
    settings = load_settings(state=tmp_path)
    assert settings.ledger == f"sqlite:///{tmp_path}/ledger.sqlite3"
    assert settings.storage == f"file://{tmp_path}/storage"
    socket = private_redis_socket(tmp_path)
    assert settings.redis == f"redis+socket://{socket}"
    assert len(str(socket)) < 100


@pytest.mark.parametrize("name", ["a?b", "50%25", "c#d", "e f", "g&h=i@j:k"])
def test_a_state_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    settings = load_settings(state=tmp_path / name)
    ledger = Ledger(settings.ledger)
    ledger.upgrade()
    ledger.close()
    open_storage(settings.storage).put("x", io.BytesIO(b"1"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {"ledger.sqlite3", "storage"} <= {path.name for path in (tmp_path / name).iterdir()}


def test_an_empty_variable_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "settings.yaml").write_text("uri_allowlist: [s3://a/]\nslots: 3\n")
    for name in ("REDIS_URL", "STATE", "SLOTS", "DEVICE", "URI_ALLOWLIST", "KEY", "SETTINGS"):
        monkeypatch.setenv(f"LLAMAHOME_{name}", "")
    settings = load_settings()
    assert (settings.redis_url, settings.state, settings.key) == (None, None, None)
    assert (settings.slots, settings.device, settings.uri_allowlist) == (3, "auto", ("s3://a/",))


def test_settings_without_a_state_folder_say_what_to_set() -> None:
    with pytest.raises(InvalidConfig, match="LLAMAHOME_LEDGER_URL"):
        _ = load_settings().ledger


def test_an_unknown_variable_is_an_error_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMAHOME_LEASE_SECOND", "4")
    with pytest.raises(InvalidConfig, match="Did you mean 'LLAMAHOME_LEASE_SECONDS'"):
        load_settings()


def test_the_environment_beats_the_file_and_arguments_beat_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "settings.yaml").write_text("lease_seconds: 5\nlog_level: debug\n")
    assert (load_settings().lease_seconds, load_settings().log_level) == (5.0, "debug")
    monkeypatch.setenv("LLAMAHOME_LEASE_SECONDS", "6")
    assert load_settings().lease_seconds == 6.0
    assert load_settings(lease_seconds=7).lease_seconds == 7.0
    monkeypatch.setenv("LLAMAHOME_LEASE_SECONDS", "soon")
    with pytest.raises(InvalidConfig, match="LLAMAHOME_LEASE_SECONDS"):
        load_settings()


def test_lists_in_the_environment_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAHOME_URI_ALLOWLIST", "s3://a/, file:///data/")
    assert load_settings().uri_allowlist == ("s3://a/", "file:///data/")


def test_the_settings_fields_are_frozen() -> None:
    assert sorted(Settings.model_fields) == [
        "claim_seconds", "device", "drain_seconds", "gateway_host", "gateway_port",
        "heartbeat_seconds", "host", "key", "lease_seconds", "ledger_url", "log_format",
        "log_level", "max_attempts", "max_file_bytes", "memory_bytes", "metrics_host",
        "metrics_port", "quota_active_jobs", "redis_url", "rering_seconds", "retry_seconds",
        "scratch", "shard_bytes", "slots", "stall_seconds", "state", "storage_url",
        "sweep_seconds", "threads", "tick_tokens", "uri_allowlist", "url", "webhook_allowlist",
    ]  # fmt: skip


def test_secrets_are_not_shown_by_repr() -> None:
    shown = repr(load_settings(key="llh-secret", ledger_url="postgresql://u:pw@h/d"))
    assert "llh-secret" not in shown
    assert "pw" not in shown


def test_every_error_is_one_line_a_person_can_act_on() -> None:
    error = LlamaHomeError("says 3, not 4.", file="a.jsonl", line=7, field="x", remedy="Write 4")
    assert str(error) == "a.jsonl:7, x: says 3, not 4. Write 4"
