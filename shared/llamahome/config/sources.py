"""Where training settings come from, and the one function that says which beats which."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from llamahome.config.strict_yaml import (
    is_there,
    parse_yaml,
    parse_yaml_mapping,
    read_text,
    read_yaml_mapping,
)
from llamahome.config.training import (
    TrainingConfig,
    parse_training_config,
    shown,
    without_aliases,
)
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
    found = load_training_file(file, environ)
    merged: dict[str, Any] = {}
    stack: list[tuple[str, Mapping[str, Any]]] = [(found.source, found.training)]
    if model_name is not None and model_name in found.overrides:
        name = f"{found.source}: model_configs.{model_name}"
        stack.append((name, found.overrides[model_name]))
    if recipe is not None:
        stack.append((f"recipe {recipe}", load_recipe(recipe)))
    stack.extend(layers)
    for name, values in stack:
        merged = merge(merged, _own_names(values, name), source=name)
        parse_training_config(merged, source=name)  # so that the error names the layer at fault
    return parse_training_config(merged, source="configuration")


def _own_names(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    # Layer by layer: once merged, an alias below could not be told from one above.
    try:
        return without_aliases(values)
    except ValueError as error:
        raise InvalidConfig(str(error), file=source) from None


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


@dataclasses.dataclass(frozen=True)
class TrainingFile:
    """A configuration file's sections; ``source`` is what error texts call it."""

    source: str
    training: Mapping[str, Any]
    overrides: Mapping[str, Mapping[str, Any]]


def load_training_file(
    file: Path | None = None, environ: Mapping[str, str] = os.environ
) -> TrainingFile:
    """``file``, else $LLAMAHOME_TRAINING_CONFIG, else the working folder's.

    A file that was named must exist; without one there are the built-in defaults.
    ``model_configs`` may stand at the top or under ``training:``.
    Raises InvalidConfig with the file and the field or line, NotFound.
    """
    path = file or (Path(environ[CONFIG_ENV]) if environ.get(CONFIG_ENV) else None)
    if path is None:
        if not is_there(CONFIG_PATH):
            return TrainingFile("built-in defaults", {}, {})
        path = CONFIG_PATH
    content, source = read_yaml_mapping(path), str(path)
    for key in content:
        if key not in _FILE_KEYS:
            raise InvalidConfig(
                "unknown key", code="unknown_parameter", file=source, field=key,
                remedy=nearest(key, _FILE_KEYS),
            )  # fmt: skip
    training = _section(content.get("training"), "training", source)
    top, nested = content.get("model_configs"), training.pop("model_configs", None)
    if top is not None and nested is not None:
        raise InvalidConfig(
            "stands under training: and at the top", file=source, field="model_configs",
            remedy="Keep one of the two",
        )  # fmt: skip
    overrides = _section(nested if top is None else top, "model_configs", source)
    return TrainingFile(source, training, _overrides(overrides, source))


def _overrides(found: Mapping[Any, Any], source: str) -> dict[str, Mapping[str, Any]]:
    for name in found:
        if not isinstance(name, str):
            raise InvalidConfig(
                f"{name!r} is no model's name", file=source, field="model_configs",
                remedy=f'Write it in quotes, as "{name}"',
            )  # fmt: skip
    return {
        name: _section(values, f"model_configs.{name}", source) for name, values in found.items()
    }


def _section(value: Any, field: str, source: str) -> dict[str, Any]:
    """A copy; nothing below a heading is an empty section."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidConfig(
            f"must be a mapping, not {type(value).__name__}", file=source, field=field
        )
    return dict(value)


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
            parsed = parse_yaml(value, source="--set")
        except InvalidConfig as error:
            raise InvalidConfig(
                f"{shown(value)} is no value ({error.message})", file="--set", field=key
            ) from None
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
    """Recipe names and their one-line descriptions: built-in ones and those in configs/recipes."""
    return {name: _description(_text(place)) for name, place in _recipe_places().items()}


def load_recipe(name: str) -> dict[str, Any]:
    """The nested training settings of a recipe. Raises NotFound naming the nearest one."""
    places = _recipe_places()
    if name not in places:
        raise NotFound(
            f"unknown recipe {name!r}", code="unknown_recipe", remedy=nearest(name, places)
        )
    return parse_yaml_mapping(_text(places[name]), source=f"recipe {name}")


def _recipe_places() -> dict[str, Traversable]:
    builtin = resources.files("llamahome.config") / "recipes"
    entries: list[Traversable] = list(builtin.iterdir())
    if (overlay := Path("configs/recipes")).is_dir():
        entries.extend(overlay.iterdir())
    found = {e.name.removesuffix(".yaml"): e for e in entries if e.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def _text(place: Traversable) -> str:
    return read_text(place) if isinstance(place, Path) else place.read_text(encoding="utf-8")


def _description(text: str) -> str:
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
