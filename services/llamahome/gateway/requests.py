"""The body of ``POST /v1/fine_tuning/jobs``, parsed strictly: what is not understood is refused.

OpenAI's own fields may all be null, which means the same as leaving them out.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llamahome.gateway import names
from llamahome.schemas import JsonObject
from llamahome.schemas.jobs import MAX_METADATA_PAIRS

MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_LARGEST = sys.float_info.max  # JSON's integers have no limit


def _whole(low: int, high: int) -> PlainValidator:
    """null and "auto" -> None; a true integer in range is kept; all else is refused."""

    def check(value: Any) -> int | None:
        if value is None or value == "auto":
            return None
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise ValueError(f'must be "auto" or an integer from {low} to {high}, not {value!r}')

    return PlainValidator(check, json_schema_input_type=Literal["auto"] | int | None)


def _positive(value: Any) -> float | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST:
        return float(value)
    raise ValueError(f'must be "auto" or a number above 0, not {value!r}')


_Positive = PlainValidator(_positive, json_schema_input_type=Literal["auto"] | float | None)


def _share(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ValueError(f"must be a number from 0 to below 1, not {value!r}")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _storable(value: Any) -> None:
    """Raise unless every text in ``value`` can be kept: PostgreSQL has no NUL, UTF-8 no halves of
    surrogate pairs. No recursion, so that no nesting is too deep for it."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str) and ("\x00" in item or not item.isascii() and _broken(item)):
            raise ValueError(f"holds a text that cannot be stored: {item[:40]!r}")


def _broken(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


class Hyperparameters(Body):
    """OpenAI's three, and the LoRA settings that people ask for; "auto" is the server's value."""

    n_epochs: Annotated[int | None, _whole(1, 50)] = None
    batch_size: Annotated[int | None, _whole(1, 256)] = None
    learning_rate_multiplier: Annotated[float | None, _Positive] = None
    learning_rate: Annotated[float | None, _Positive] = None
    lora_r: Annotated[int | None, _whole(1, 4096)] = None
    lora_alpha: Annotated[float | None, _Positive] = None
    lora_dropout: Annotated[
        float | None, PlainValidator(_share, json_schema_input_type=float | None)
    ] = None
    target_modules: Literal["all-linear"] | list[StrictStr] | None = None


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """How to train. ``supervised`` is the one that is offered."""

    type: StrictStr
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None

    @field_validator("type")
    @classmethod
    def _offered(cls, value: str) -> str:
        if value != "supervised":
            raise PydanticCustomError(
                "unsupported_method", "only 'supervised' is offered, not {given}",
                {"given": repr(value)},
            )  # fmt: skip
        return value

    @field_validator("dpo", "reinforcement")
    @classmethod
    def _absent(cls, value: Any) -> None:
        if value is not None:
            raise PydanticCustomError(
                "unsupported_method", "only 'supervised' is offered, not this"
            )


class CreateJob(Body):
    """A fine-tuning job to be. The last three fields are ours (``extra_body`` in OpenAI's client):
    nested training settings, a recipe's name, and an id that makes sending this again harmless."""

    model: Annotated[StrictStr, Field(min_length=1)]
    training_file: Annotated[StrictStr, Field(min_length=1)]
    validation_file: Annotated[StrictStr, Field(min_length=1)] | None = None
    suffix: Annotated[StrictStr, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2_147_483_647)] | None = None
    metadata: dict[StrictStr, StrictStr] | None = None
    integrations: list[Any] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="Deprecated by OpenAI in favour of method.supervised"
    )
    config: JsonObject | None = None
    recipe: Annotated[StrictStr, Field(min_length=1)] | None = None
    submission_id: Annotated[StrictStr, Field(min_length=1, max_length=128)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        _storable(value)
        return value

    @field_validator("metadata")
    @classmethod
    def _small(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        pairs = value or {}
        if len(pairs) > MAX_METADATA_PAIRS:
            raise ValueError(f"must have at most {MAX_METADATA_PAIRS} pairs, not {len(pairs)}")
        for key, text in pairs.items():
            if not 1 <= len(key) <= MAX_METADATA_KEY_CHARS:
                raise ValueError(f"keys have 1 to {MAX_METADATA_KEY_CHARS} chars, not {len(key)}")
            if len(text) > MAX_METADATA_VALUE_CHARS:
                raise ValueError(
                    f"values have at most {MAX_METADATA_VALUE_CHARS} chars, not {len(text)}"
                )
        return value

    @field_validator("integrations")
    @classmethod
    def _none_offered(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise PydanticCustomError(
                "unsupported_parameter", "no integration is offered, so none may be asked for"
            )
        return value

    @field_validator("submission_id")
    @classmethod
    def _not_reserved(cls, value: str | None) -> str | None:
        for prefix in (names.KEY_SUBMISSION_PREFIX, names.BODY_SUBMISSION_PREFIX):
            if value is not None and value.startswith(prefix):
                raise ValueError(f"must not begin with {prefix!r}, which the gateway uses itself")
        return value


_SECTIONS: dict[tuple[str, ...], type[Body]] = {
    (): CreateJob,
    ("hyperparameters",): Hyperparameters,
    ("method",): Method,
    ("method", "supervised"): Supervised,
    ("method", "supervised", "hyperparameters"): Hyperparameters,
}
KNOWN_FIELDS = {path: sorted(model.model_fields) for path, model in _SECTIONS.items()}
