"""Where training settings come from, and the one function that says which beats which."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llamahome.config.training import TrainingConfig, parse_training_config
from llamahome.errors import InvalidConfig, NotFound, nearest

CONFIG_ENV = "LLAMAHOME_TRAINING_CONFIG"
CONFIG_PATH = Path(".config/training_config.yaml")
_FILE_KEYS = ("training", "model_configs")


def resolve_training_config(
    *,
    model_name: str | None = None,
    file: Path | None = None,
    recipe: str | None = None,
    layers: Iterable[tuple[str, Mapping[str, Any]]] = (),
    environ: Mapping[str, str] = os.environ,
) -> TrainingConfig:
    """The effective configuration; later beats earlier.

    Built-in defaults < the file's ``training:`` < the file's ``model_configs.<model_name>`` < the
    recipe < ``layers`` in their order (each a name for error texts, and nested keys).
    Sections are merged key by key, lists are replaced. Nothing that is passed in is changed.
    Raises InvalidConfig with the source, the dotted field and the remedy.
    """
    source, content = load_training_file(file, environ)
    merged: dict[str, Any] = {}
    stack: list[tuple[str, Mapping[str, Any]]] = [(source, content.get("training") or {})]
    overrides = content.get("model_configs") or {}
    if model_name is not None and model_name in overrides:
        stack.append((f"{source}: model_configs.{model_name}", overrides[model_name] or {}))
    if recipe is not None:
        stack.append((f"recipe {recipe}", load_recipe(recipe)))
    stack.extend(layers)
    for name, values in stack:
        merged = merge(merged, values, source=name)
        parse_training_config(merged, source=name)  # so that the error names the layer at fault
    return parse_training_config(merged, source="configuration")


# libyaml's loader is several times faster, and it is read for every job that is accepted; both
# are safe ones, which make nothing but plain values.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def merge(below: Mapping[str, Any], above: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """``above`` laid over ``below``: mappings are merged, everything else is replaced."""
    if not isinstance(above, Mapping):
        raise InvalidConfig(f"must be a mapping, not {type(above).__name__}", file=source)
    out = dict(below)
    for key, value in above.items():
        base = out.get(key)
        if isinstance(base, Mapping) and isinstance(value, Mapping):
            out[key] = merge(base, value, source=source)
        else:
            out[key] = dict(value) if isinstance(value, Mapping) else value
    return out


def load_training_file(
    file: Path | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[str, dict[str, Any]]:
    """The file's content and its name: ``file``, $LLAMAHOME_TRAINING_CONFIG, the working folder.

    A file that was named must exist; without one, empty content (the built-in defaults) is
    returned. ``model_configs`` may stand at the top or under ``training:``.
    """
    path = file or (Path(environ[CONFIG_ENV]) if environ.get(CONFIG_ENV) else None)
    if path is None:
        if not CONFIG_PATH.is_file():
            return "built-in defaults", {}
        path = CONFIG_PATH
    content = read_yaml_mapping(path)
    for key in content:
        if key not in _FILE_KEYS:
            raise InvalidConfig(
                "unknown key", code="unknown_parameter", file=str(path), field=str(key),
                remedy=nearest(str(key), _FILE_KEYS),
            )  # fmt: skip
    training = content.get("training") or {}
    if isinstance(training, dict) and "model_configs" in training:
        content = {
            "training": {k: v for k, v in training.items() if k != "model_configs"},
            "model_configs": content.get("model_configs") or training["model_configs"],
        }
    overrides = content.get("model_configs") or {}
    if not isinstance(overrides, dict):
        raise InvalidConfig("must be a mapping", file=str(path), field="model_configs")
    return str(path), content


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that must hold a mapping or nothing. Raises InvalidConfig with the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFound("no such file", file=str(path), code="file_not_found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"cannot be read ({error})", file=str(path)) from None
    return parse_yaml_mapping(text, source=str(path))


def parse_yaml_mapping(text: str, *, source: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InvalidConfig(f"broken YAML: {problem}", file=source, line=line) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidConfig(f"must be a mapping, not {type(content).__name__}", file=source)
    return content


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["lora.r=16", "epochs=1"]`` -> nested mapping; values are YAML. Raises InvalidConfig."""
    out: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise InvalidConfig(
                f"{assignment!r} is not key=value", file="--set",
                remedy="Write for example --set lora.r=16",
            )  # fmt: skip
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InvalidConfig(f"{value!r} is not a YAML value", file="--set", field=key) from None
        nested: dict[str, Any] = {}
        leaf = nested
        *sections, name = key.strip().split(".")
        for section in sections:
            leaf[section] = {}
            leaf = leaf[section]
        leaf[name] = parsed
        out = merge(out, nested, source="--set")
    return out


def recipes() -> dict[str, str]:
    """Recipe names and their one-line descriptions: built-in ones, then ``configs/recipes``."""
    return {name: _description(text) for name, text in _recipe_texts().items()}


def load_recipe(name: str) -> dict[str, Any]:
    """The nested training settings of a recipe. Raises NotFound naming the nearest one."""
    texts = _recipe_texts()
    if name not in texts:
        raise NotFound(
            f"unknown recipe {name!r}", code="unknown_recipe", remedy=nearest(name, texts)
        )
    return parse_yaml_mapping(texts[name], source=f"recipe {name}")


def _recipe_texts() -> dict[str, str]:
    found: dict[str, str] = {}
    builtin = resources.files("llamahome.config") / "recipes"
    for entry in builtin.iterdir():
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = entry.read_text(encoding="utf-8")
    overlay = Path("configs/recipes")
    if overlay.is_dir():
        for path in sorted(overlay.glob("*.yaml")):
            found[path.stem] = path.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def _description(text: str) -> str:
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
