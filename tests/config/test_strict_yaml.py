"""What a settings file may not be, and that each is an error with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamahome.config import (
    load_registry,
    load_settings,
    parse_assignments,
    recipes,
    resolve_training_config,
)
from llamahome.errors import InvalidConfig


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may read the repository's own files by being started in it."""
    monkeypatch.chdir(tmp_path)


def _refused(text: str, match: str) -> InvalidConfig:
    file = Path("c.yaml")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfig, match=match) as caught:
        resolve_training_config(file=file, environ={})
    assert caught.value.place.file == "c.yaml"
    return caught.value


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("9" * 5000, "Exceeds the limit"),
        ("0x" + "f" * 5000, "an integer of 20000 bits"),
        ("2024-13-45", "month must be in 1..12"),
        ("2024-01-01 10:00:00 +99:00", "offset"),
        ("0b_", "invalid literal"),
        ("!!int x", "tag"),
        ("!!python/name:os.system", "tag"),
        ("[" * 100_000, "nested deeper than 32"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("&a [*a]", "stands within itself"),
        ("&a {b: {c: *a}}", "stands within itself"),
        ("{epochs: 1, epochs: 2}", "'epochs' stands here twice"),
        ("[1", "expected"),
        ("*nobody", "alias"),
        ("\x01", "control characters"),
    ],
)
def test_what_is_no_plain_value_is_an_error_at_its_line(value: str, match: str) -> None:
    error = _refused(f"training:\n  epochs: {value}\n", match)
    assert error.place.line in (2, 3) or "\x01" in value


def test_aliases_that_stack_up_are_nesting_too() -> None:
    levels = "".join(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 60))
    _refused(f"l0: &l0 [1]\n{levels}", "nested deeper than 32")


def test_a_value_that_unfolds_without_end_is_shown_in_short() -> None:
    levels = "".join(f"  l{n}: &l{n} [{f'*l{n - 1}, ' * 9}]\n" for n in range(1, 25))
    _refused(f"training:\n  l0: &l0 [1]\n{levels}", "unknown key")
    bomb = "&l0 [1]"
    for n in range(1, 20):
        bomb = f"&l{n} [{bomb}, {f'*l{n - 1}, ' * 9}]"
    error = _refused(f"training:\n  epochs: {bomb}\n", "valid integer")
    assert len(str(error)) < 2000


def test_one_mapping_may_stand_in_several_places(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model_configs:\n  a: &a {epochs: 2, lora: {r: 4}}\n  b: *a\n  c:\n    <<: *a\n"
        "    epochs: 7\n  !!str 3.3: {epochs: 9}\n"
    )
    for name, epochs in (("a", 2), ("b", 2), ("c", 7), ("3.3", 9)):
        assert resolve_training_config(file=file, model_name=name, environ={}).epochs == epochs


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("training: []\n", "training"),
        ("training: false\n", "training"),
        ("training: 0\n", "training"),
        ("training: ''\n", "training"),
        ("model_configs: []\n", "model_configs"),
        ("training: {model_configs: false}\n", "model_configs"),
        ("model_configs: {llama: false}\n", "model_configs.llama"),
        ("model_configs: {other: []}\n", "model_configs.other"),
        ("model_configs: {3.3: {}}\n", "model_configs"),
        ("training: {model_configs: {a: {epochs: 1}}}\nmodel_configs: {b: {}}\n", "model_configs"),
        ("training: {lora: }\n", "lora"),
    ],
)
def test_a_section_that_is_no_mapping_is_not_taken_for_an_empty_one(text: str, field: str) -> None:
    assert _refused(text, "mapping|no model's name|stands under").place.field == field


@pytest.mark.parametrize("value", ["9" * 5000, "2024-13-45", "[" * 100_000, "&a [*a]", "\udcff"])
def test_an_assignment_of_no_value_names_its_key(value: str) -> None:
    with pytest.raises(InvalidConfig, match="is no value") as caught:
        parse_assignments([f"lora.r={value}"])
    assert (caught.value.place.file, caught.value.place.field) == ("--set", "lora.r")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["1: 2", "true: 5", "2024-01-01: x", "slots: 0x" + "f" * 5000])
def test_the_settings_have_names_and_values_that_can_be_shown(text: str) -> None:
    Path("configs").mkdir()
    for name, load in (("settings", load_settings), ("models", load_registry)):
        Path(f"configs/{name}.yaml").write_text(text)
        with pytest.raises(InvalidConfig, match=rf"{name}\.yaml.*(keys must be text|20000 bits)"):
            load()
        Path(f"configs/{name}.yaml").unlink()


def test_a_link_that_leads_nowhere_is_not_taken_for_no_file(tmp_path: Path) -> None:
    for path in (".config/training_config.yaml", "configs/settings.yaml", "configs/models.yaml"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).symlink_to(tmp_path / "gone.yaml")
    for load in (
        lambda: resolve_training_config(environ={}), load_settings, load_registry,
        lambda: resolve_training_config(file=Path("configs/models.yaml"), environ={}),
    ):  # fmt: skip
        with pytest.raises(InvalidConfig, match=r"link to .*gone\.yaml, which is not there"):
            load()


def test_a_folder_in_the_place_of_the_file_is_not_taken_for_no_file() -> None:
    Path(".config/training_config.yaml").mkdir(parents=True)
    with pytest.raises(InvalidConfig, match="cannot be read"):
        resolve_training_config(environ={})


def test_a_recipe_that_cannot_be_read_is_named_and_costs_no_other() -> None:
    Path("configs/recipes").mkdir(parents=True)
    Path("configs/recipes/latin.yaml").write_bytes(b"# caf\xe9\nepochs: 1\n")
    assert resolve_training_config(recipe="quick", environ={})
    for read in (recipes, lambda: resolve_training_config(recipe="latin", environ={})):
        with pytest.raises(InvalidConfig, match=r"latin\.yaml: cannot be read"):
            read()


def test_json_is_read_as_the_yaml_it_is(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"training": {"epochs": 2, "lora": {"target_modules": ["a"]}}}))
    assert resolve_training_config(file=file, environ={}).lora.target_modules == ("a",)
