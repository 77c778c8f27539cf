"""Settings as SPEC.md writes them: the file, the overrides, what beats what, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamahome.config import TrainingConfig, resolve_training_config
from llamahome.errors import InvalidConfig, NotFound
from llamahome.local import TrainingData

SHIPPED = Path(__file__).parents[2] / ".config" / "training_config.yaml"
SPEC = """
training:
  # General settings
  batch_size: 4
  max_workers: 4
  max_length: 512
  validation_split: 0.1

  # Training parameters
  epochs: 3
  learning_rate: 5e-5
  warmup_steps: 100
  weight_decay: 0.01
  gradient_accumulation_steps: 4
  fp16: true

  # LoRA settings
  lora:
    r: 8
    alpha: 32
    dropout: 0.1
    target_modules: ["q_proj", "v_proj"]
    bias: "none"

  # Early stopping
  early_stopping:
    enabled: true
    patience: 3
    min_delta: 0.01
"""
OVERRIDES = """
model_configs:
  llama:
    batch_size: 2
    max_length: 1024
    lora:
      r: 16
      target_modules: ["q_proj", "k_proj", "v_proj", "o_proj"]
"""
FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(text: str | bytes) -> Path:
    """The file where it is looked for."""
    path = Path(".config/training_config.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.strip().splitlines())


def test_the_shipped_file_is_spec_s_and_is_read_from_its_place(tmp_path: Path) -> None:
    """BEHAVIOUR 13: every key of SPEC.md with SPEC.md's value; read from .config."""
    assert yaml.safe_load(SHIPPED.read_text()) == yaml.safe_load(SPEC + OVERRIDES)
    write(SHIPPED.read_text().replace("epochs: 3", "epochs: 9"))
    assert TrainingData(tmp_path).effective_config("other").epochs == 9


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", '"5e-5"', "0.00005", "'0.5e-4'"])
def test_a_learning_rate_is_the_number_it_means(tmp_path: Path, text: str) -> None:
    """BEHAVIOUR 14: 5e-5, which YAML reads as text, arrives as the float 0.00005."""
    write(f"training: {{learning_rate: {text}}}")
    rate = TrainingData(tmp_path).effective_config().learning_rate
    assert isinstance(rate, float)
    assert math.isclose(rate, 0.00005)


@pytest.mark.parametrize(
    "content", [None, "", "# nothing\n", "model_configs: {}\n", "training:\n", "training: null\n"]
)
def test_a_file_that_says_nothing_means_the_defaults(tmp_path: Path, content: str | None) -> None:
    """BEHAVIOUR 15: missing, empty, comments only, no training: or a null one."""
    if content is not None:
        write(content)
    assert TrainingData(tmp_path).effective_config() == TrainingConfig()


def test_broken_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    """BEHAVIOUR 15: broken YAML names the file and the line."""
    path = write("training:\n  epochs: 3\n  lora: [\n")
    with pytest.raises(InvalidConfig) as caught:
        TrainingData(tmp_path).effective_config()
    assert caught.value.place.file == str(path)
    assert caught.value.place.line is not None
    assert caught.value.place.line >= 3


@pytest.mark.parametrize("text", [SPEC + OVERRIDES, SPEC + indented(OVERRIDES)])
def test_the_llama_override_changes_what_it_names(tmp_path: Path, text: str) -> None:
    """BEHAVIOUR 16, 17: model_configs at the top or under training; keys that are not named are
    inherited, inside lora too; lists are replaced."""
    write(text)
    config = TrainingData(tmp_path).effective_config("llama")
    assert (config.batch_size, config.max_length) == (2, 1024)
    assert (config.lora.r, config.lora.target_modules) == (16, FOUR)
    expected = TrainingConfig().model_dump()
    expected |= {"batch_size": 2, "max_length": 1024}
    expected["lora"] |= {"r": 16, "target_modules": FOUR}
    assert config.model_dump() == expected


def test_overrides_do_not_leak(tmp_path: Path) -> None:
    """BEHAVIOUR 18: neither to another model, nor into the caller's dict, nor between managers."""
    write(SPEC + OVERRIDES)
    given: dict[str, Any] = {"lora": {"alpha": 5, "target_modules": ["o_proj"]}}
    before = copy.deepcopy(given)
    first, second = TrainingData(tmp_path / "a", config=given), TrainingData(tmp_path / "b")
    assert first.effective_config("llama", lora_r=2).lora.r == 2
    assert first.effective_config("llama").lora.r == 16
    assert given == before
    given["lora"]["alpha"] = 99
    assert first.effective_config().lora.alpha == 5
    other = second.effective_config("mistral")
    assert (other.lora.r, other.lora.target_modules) == (8, ("q_proj", "v_proj"))
    assert second.effective_config("llama").lora.alpha == 32


def test_later_sources_beat_earlier_ones(tmp_path: Path) -> None:
    """BEHAVIOUR 19: defaults < file < its override < constructor < config= < call keywords."""
    write(
        "training: {batch_size: 5, max_length: 100, epochs: 5, learning_rate: 1e-3, seed: 1}\n"
        "model_configs: {llama: {batch_size: 6, max_length: 200, epochs: 6, seed: 2}}"
    )
    manager = TrainingData(
        tmp_path, batch_size=7, max_workers=4, config={"epochs": 8, "max_length": 300}
    )
    config = manager.effective_config("llama", num_epochs=9)
    assert (config.weight_decay, config.learning_rate, config.seed) == (0.01, 1e-3, 2)
    assert (config.batch_size, config.max_length, config.epochs) == (7, 300, 9)
    assert manager.effective_config("llama").epochs == 8
    # What equals the signature's default is not explicit.
    assert TrainingData(tmp_path).effective_config("llama").batch_size == 6
    assert TrainingData(tmp_path, 7, config={"batch_size": 3}).effective_config().batch_size == 3


def test_a_batch_size_given_to_the_constructor_is_the_one_used(tmp_path: Path) -> None:
    """BEHAVIOUR 20: batch_size=16 is in the effective settings of every model. (That batches have
    it: test_batches.py.)"""
    write(SPEC + OVERRIDES)
    manager = TrainingData(tmp_path, batch_size=16, max_workers=2)
    for model in ("llama", "other"):
        config = manager.effective_config(model)
        assert (config.batch_size, config.max_workers) == (16, 2)


NAN, INFINITY = float("nan"), float("inf")
WRONG: list[tuple[str, list[Any]]] = [
    ("validation_split", [1, 1.0, 1.5, -0.1, NAN, "0.1", True]),
    ("epochs", [0, -1]),
    ("learning_rate", [0, -1e-5, NAN, INFINITY]),
    ("warmup_steps", [-1]),
    ("weight_decay", [-0.1]),
    ("gradient_accumulation_steps", [0]),
    ("max_length", [0, 7]),
    ("lora.r", [0]),
    ("lora.alpha", [0, -1]),
    ("lora.dropout", [1, 1.5, -0.1, NAN]),
    ("lora.bias", ["all", "lora_only", "some"]),
    ("lora.target_modules", [[], "q_proj", ["q_proj", "q_proj"]]),
    ("early_stopping.patience", [0]),
    ("early_stopping.min_delta", [-0.01, NAN]),
]


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG for v in values])
def test_a_value_out_of_range_is_refused_with_its_field(
    tmp_path: Path, field: str, value: Any
) -> None:
    """BEHAVIOUR 21, 58: from the file and from config= alike; the error names source and field."""
    *section, key = field.split(".")
    nested: dict[str, Any] = {section[0]: {key: value}} if section else {key: value}
    with pytest.raises(InvalidConfig) as given:
        TrainingData(tmp_path, config=nested)
    assert (given.value.place.file, given.value.place.field) == ("config", field)
    path = write(yaml.safe_dump({"training": nested}))
    with pytest.raises(InvalidConfig) as read:
        TrainingData(tmp_path).effective_config()
    assert (read.value.place.file, read.value.place.field) == (str(path), field)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_is_not_supported_is_refused_with_the_reason(tmp_path: Path, bias: str) -> None:
    """BEHAVIOUR 21: bias all and lora_only are refused, saying why."""
    with pytest.raises(InvalidConfig, match="bias terms"):
        TrainingData(tmp_path, config={"lora": {"bias": bias}})


@pytest.mark.parametrize(
    ("field", "value"),
    [("fp16", "yes"), ("fp16", 1), ("epochs", True), ("epochs", 4.0), ("epochs", "3"),
     ("batch_size", 4.0), ("max_length", "512"), ("learning_rate", "fast"),
     ("learning_rate", True), ("weight_decay", None)],
)  # fmt: skip
def test_types_are_strict(tmp_path: Path, field: str, value: Any) -> None:
    """BEHAVIOUR 22: no bool for a number, no text for a bool, no float for a count."""
    with pytest.raises(InvalidConfig) as caught:
        TrainingData(tmp_path, config={field: value})
    assert caught.value.place.field == field


@pytest.mark.asyncio
async def test_a_version_that_yaml_read_as_a_number_says_what_to_write(tmp_path: Path) -> None:
    """BEHAVIOUR 22: model_version: 3.3, a YAML float, is refused with the text to write."""
    version: Any = yaml.safe_load("model_version: 3.3")["model_version"]
    with pytest.raises(InvalidConfig, match=r"Write '3\.3'"):
        await TrainingData(tmp_path).process_samples("llama", version)


def test_a_typo_is_told_with_the_nearest_key(tmp_path: Path) -> None:
    """BEHAVIOUR 23: an unknown key is an error naming the one that was meant, in every source."""
    path = write("training: {learning_rat: 1e-3}")
    with pytest.raises(InvalidConfig, match="'learning_rate'") as caught:
        TrainingData(tmp_path).effective_config()
    assert (caught.value.place.file, caught.value.code) == (str(path), "unknown_parameter")
    with pytest.raises(InvalidConfig, match="'dropout'"):
        TrainingData(tmp_path, config={"lora": {"dropot": 0.1}})
    write("trainin: {}")
    with pytest.raises(InvalidConfig, match="'training'"):
        TrainingData(tmp_path).effective_config()


def test_the_originals_other_sections_are_known(tmp_path: Path) -> None:
    """BEHAVIOUR 23: checkpointing {save_strategy, save_total_limit} and logging {steps,
    eval_steps} are read."""
    write(
        "training:\n  checkpointing: {save_strategy: steps, save_total_limit: 5}\n"
        "  logging: {steps: 10, eval_steps: 20}\n"
    )
    config = TrainingData(tmp_path).effective_config()
    assert (config.checkpointing.save_strategy, config.checkpointing.save_total_limit) == (
        "steps", 5,
    )  # fmt: skip
    assert (config.logging.steps, config.eval_steps) == (10, 20)


def test_the_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """BEHAVIOUR 24: UTF-8, with or without a mark before it."""
    write("\ufeff# Schrittweite: größer\ntraining: {epochs: 7}".encode())
    assert TrainingData(tmp_path).effective_config().epochs == 7


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 24: neither bad bytes, nor a folder in its place, nor a missing named file."""
    path = write(b"training: {epochs: \xff}")
    with pytest.raises(InvalidConfig, match="cannot be read") as caught:
        TrainingData(tmp_path).effective_config()
    assert caught.value.place.file == str(path)
    monkeypatch.setenv("LLAMAHOME_TRAINING_CONFIG", str(tmp_path))
    with pytest.raises(InvalidConfig, match="cannot be read"):
        TrainingData(tmp_path).effective_config()
    monkeypatch.setenv("LLAMAHOME_TRAINING_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(NotFound, match=r"none\.yaml"):
        TrainingData(tmp_path).effective_config()


def test_the_facade_has_no_settings_of_its_own(tmp_path: Path) -> None:
    """BEHAVIOUR 25: what a queue worker gets for the same settings is what the facade gets.

    That the config is saved with the model: test_training.py; that a submission's settings are
    checked by the same schema: tests/queueing/test_admission.py."""
    write(SPEC + OVERRIDES)
    wishes = {"epochs": 2, "lora": {"dropout": 0.0}}
    of_a_job = resolve_training_config(model_name="llama", layers=[("config", wishes)])
    assert TrainingData(tmp_path, config=wishes).effective_config("llama") == of_a_job
