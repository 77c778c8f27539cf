"""From a request to training settings: pure functions, no ledger and no HTTP."""

from __future__ import annotations

import dataclasses
from typing import Any

from llamahome.config import (
    TrainingConfig,
    load_recipe,
    merge,
    parse_training_config,
)
from llamahome.errors import InvalidConfig, NotFound
from llamahome.gateway.requests import CreateJob, Hyperparameters
from llamahome.queueing.models import Start, effective_config
from llamahome.schemas import JsonObject

# Where each hyperparameter stands in the training configuration.
_KEYS = {
    "n_epochs": ("epochs",),
    "batch_size": ("batch_size",),
    "learning_rate": ("learning_rate",),
    "lora_r": ("lora", "r"),
    "lora_alpha": ("lora", "alpha"),
    "lora_dropout": ("lora", "dropout"),
    "target_modules": ("lora", "target_modules"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """``layer`` is what the request sets, nested; ``effective`` is what that comes to."""

    layer: JsonObject
    effective: TrainingConfig


def wish_of(body: CreateJob, start: Start) -> Wish:
    """The training settings a request asks for, "auto" being the effective configuration's value.

    A learning rate multiplier multiplies the configuration's learning rate. Rows that cannot be
    used fail the job (``max_invalid_share`` 0), unless the request or its recipe allows some.
    ``start`` is what the request's model names. Raises InvalidConfig with the parameter at fault.
    """
    wanted = _one_set(body)
    layer = _laid_over(body, wanted)
    effective = _resolved(body, layer, start)
    set_here: JsonObject = {}
    if wanted.learning_rate_multiplier is not None:
        set_here["learning_rate"] = effective.learning_rate * wanted.learning_rate_multiplier
    if "max_invalid_share" not in layer and not _recipe_allows(body.recipe):
        set_here["max_invalid_share"] = 0.0
    settled = {**effective.model_dump(mode="json"), **set_here}
    return Wish({**layer, **set_here}, parse_training_config(settled, source="request"))


def _one_set(body: CreateJob) -> Hyperparameters:
    """The deprecated top-level set and ``method``'s must say the same where both are given."""
    method = body.method.supervised if body.method is not None else None
    current = method.hyperparameters if method is not None else None
    if current is not None and body.hyperparameters is not None and current != body.hyperparameters:
        raise InvalidConfig(
            "differs from method.supervised.hyperparameters", field="hyperparameters",
            remedy="Give one of the two",
        )  # fmt: skip
    wanted = current or body.hyperparameters or Hyperparameters()
    if wanted.learning_rate is not None and wanted.learning_rate_multiplier is not None:
        raise InvalidConfig(
            f"is {wanted.learning_rate_multiplier}, and learning_rate is {wanted.learning_rate}: "
            "each would set the learning rate",
            field="hyperparameters.learning_rate_multiplier", remedy="Give one of the two",
        )  # fmt: skip
    return wanted


def _laid_over(body: CreateJob, wanted: Hyperparameters) -> JsonObject:
    layer: JsonObject = dict(body.config or {})
    given: list[tuple[str, tuple[str, ...], Any]] = [
        (f"hyperparameters.{name}", path, getattr(wanted, name)) for name, path in _KEYS.items()
    ]
    given.append(("seed", ("seed",), body.seed))
    for param, path, value in given:
        if value is None:
            continue
        stands = _at(layer, path)
        if stands is not None and stands != value:
            raise InvalidConfig(
                f"{param} is {value!r}, but config.{'.'.join(path)} is {stands!r}", field=param,
                remedy="Give one of the two",
            )  # fmt: skip
        nested: Any = value
        for key in reversed(path):
            nested = {key: nested}
        layer = merge(layer, nested, source="config")
    return layer


def _at(layer: JsonObject, path: tuple[str, ...]) -> Any:
    value: Any = layer
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _resolved(body: CreateJob, layer: JsonObject, start: Start) -> TrainingConfig:
    try:
        return effective_config(start, body.recipe, layer)
    except NotFound as error:
        raise InvalidConfig(
            error.message, code=error.code, remedy=error.remedy, field="recipe"
        ) from None
    except InvalidConfig as error:
        if error.place.file != "config":
            raise
        field = f"config.{error.place.field}" if error.place.field else "config"
        raise InvalidConfig(
            f"{field}: {error.message}", code=error.code, remedy=error.remedy, field=field
        ) from None


def _recipe_allows(recipe: str | None) -> bool:
    return recipe is not None and "max_invalid_share" in load_recipe(recipe)
