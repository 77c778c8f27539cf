"""``TrainingConfig``: what to train. The same schema checks the file, ``--set`` and job payloads.

Types are strict on purpose: a bool is no number, "yes" is no bool, 4.0 is no int. The one leniency
is ``learning_rate: 5e-5``, which YAML 1.1 reads as a string and everybody means as a number.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from llamahome.config.strict_yaml import MAX_INTEGER_BITS
from llamahome.errors import InvalidConfig, nearest

MIN_MAX_LENGTH = 8  # the least that can hold a turn
MAX_MAX_LENGTH = 1024 * 1024
MAX_RANK = 4096
MAX_ALPHA = 1e6
MAX_COUNT = 2**31 - 1
# A worker holds a few rows of this size beside each other.
MAX_MAX_LINE_BYTES = 64 * 1024 * 1024
_EXPONENT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """``"5e-5"`` -> 5e-05, int -> float; anything else is left to the strict check."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("does not fit into a float of 64 bits") from None
    return value


Number = Annotated[StrictFloat, Field(allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)]


class Section(BaseModel):
    """Frozen; unknown keys are errors (reported with the nearest known name)."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraConfig(Section):
    """LoRA (Hu et al. 2021): W + (alpha / r) B A, or alpha / sqrt(r) with ``use_rslora``.

    ``merge``: publish the whole base with that added into its weights, too.
    """

    r: Positive = 8
    alpha: Annotated[Number, Field(gt=0)] = 32.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    target_modules: tuple[StrictStr, ...] | Literal["all-linear"] = ("q_proj", "v_proj")
    bias: StrictStr = "none"
    use_rslora: StrictBool = False
    merge: StrictBool = False

    @field_validator("r")
    @classmethod
    def _rank(cls, value: int) -> int:
        if value > MAX_RANK:
            raise ValueError(
                f"must be at most {MAX_RANK}, where A and B together are as large as a base's "
                f"matrix of {2 * MAX_RANK} x {2 * MAX_RANK}"
            )
        return value

    @field_validator("alpha")
    @classmethod
    def _scale(cls, value: float) -> float:
        if value > MAX_ALPHA:
            raise ValueError(f"must be at most {MAX_ALPHA:.0f}: the update is scaled by alpha / r")
        return value

    # Before pydantic's union, whose errors would name one of its members in the field.
    @field_validator("target_modules", mode="before")
    @classmethod
    def _modules(cls, value: Any) -> Any:
        if value == "all-linear":
            return "all-linear"
        if not isinstance(value, (list, tuple)):
            raise ValueError('must be a list of module names or "all-linear"')
        if not value:
            raise ValueError("must name at least one module")
        for name in value:
            if not isinstance(name, str) or not name or not name.isprintable():
                raise ValueError(f"must hold names of modules, not {shown(name)}")
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} twice")
        return tuple(value)

    @field_validator("bias")
    @classmethod
    def _bias(cls, value: str) -> str:
        if value in ("all", "lora_only"):
            raise ValueError(
                f"{value!r} would train the base's own bias terms, and the adapter could no longer "
                'be combined with others or served beside them; only "none" is supported'
            )
        if value != "none":
            raise ValueError(f'must be "none", not {shown(value)}')
        return value


class EarlyStoppingConfig(Section):
    """Stop after ``patience`` evaluations without an improvement > ``min_delta`` nats."""

    enabled: StrictBool = True
    patience: Positive = 3
    min_delta: Annotated[Number, Field(ge=0)] = 0.01


class CheckpointingConfig(Section):
    """When resume points are written and how many are kept (the best is never deleted)."""

    save_strategy: Literal["epoch", "steps"] = "epoch"
    save_steps: Positive = 100
    save_total_limit: Positive = 3
    resume: StrictBool = True


class LoggingConfig(Section):
    """Metrics are logged every ``steps`` optimizer steps."""

    steps: Positive = 1


class ValidationConfig(Section):
    """How rows are read. At a limit passes, one more is refused.

    ``format`` None: each file's rows show it.
    """

    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None
    max_messages: Positive = 1000
    max_chars_per_message: Positive = 1_000_000
    max_line_bytes: Annotated[StrictInt, Field(ge=1, le=MAX_MAX_LINE_BYTES)] = 16 * 1024 * 1024


class TrainingConfig(Section):
    """Everything that decides what comes out, and nothing about where it runs."""

    batch_size: Positive = 4
    max_workers: Positive = 4
    max_length: Annotated[StrictInt, Field(ge=MIN_MAX_LENGTH, le=MAX_MAX_LENGTH)] = 512
    validation_split: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    epochs: Positive = 3
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    warmup_steps: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] = 100
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    gradient_accumulation_steps: Positive = 4
    fp16: StrictBool = True
    lora: LoraConfig = LoraConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()

    seed: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] = 42
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    packing: StrictBool = True
    eval_steps: Positive | None = None
    mode: Literal["fast", "exact"] = "fast"
    loss_scope: Literal["assistant", "last", "all"] = "assistant"
    template: Literal["auto", "markers"] = "auto"
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    duplicates: Literal["keep", "drop"] = "keep"
    max_invalid_share: Annotated[Number, Field(ge=0, le=1)] = 1.0
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    logging: LoggingConfig = LoggingConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _mergeable(self) -> Self:
        if self.lora.merge and self.template == "markers":
            raise ValueError(
                "lora.merge cannot be had with template: markers, whose tokens the base's matrices "
                "have no rows for"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _eval_steps_alias(cls, value: Any) -> Any:
        return without_aliases(value) if isinstance(value, dict) else value


def without_aliases(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """``logging.eval_steps`` under the name that it is an alias of, ``eval_steps``.

    Raises ValueError where ``values`` has both and they differ.
    """
    section = values.get("logging") if isinstance(values, Mapping) else None
    if not isinstance(section, Mapping) or "eval_steps" not in section:
        return values
    logging = dict(section)
    alias = logging.pop("eval_steps")
    if (own := values.get("eval_steps", alias)) != alias:
        raise ValueError(f"eval_steps is {shown(own)}, logging.eval_steps is {shown(alias)}")
    return {**values, "logging": logging, "eval_steps": alias}


def parse_training_config(values: dict[str, Any], *, source: str) -> TrainingConfig:
    """Check ``values`` (nested keys) and fill in the defaults.

    Raises InvalidConfig naming ``source``, the dotted field, the value and the nearest known key.
    """
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        raise _first_problem(error, source) from None


def _first_problem(error: ValidationError, source: str) -> InvalidConfig:
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    field = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = known_keys(path[:-1])
        return InvalidConfig(
            "unknown key", code="unknown_parameter", file=source, field=field,
            remedy=nearest(path[-1], known),
        )  # fmt: skip
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = "must be a mapping of settings"
    value = problem.get("input")
    told = isinstance(value, dict) or ", not " in message
    given = "" if told else f", not {shown(value)}"
    return InvalidConfig(message[0].lower() + message[1:] + given, file=source, field=field or None)


class _Short(reprlib.Repr):
    """Of a bounded size and depth whatever is given: a value may be huge or hold itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple = 2, 12, 12
        self.maxstring = self.maxother = 120
        self.maxlong = 40

    def repr_int(self, x: int, level: int) -> str:
        # str() refuses integers of more than some thousand digits.
        if x.bit_length() > MAX_INTEGER_BITS:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """``repr(value)``, shortened where it is long."""
    return _SHORT.repr(value)


def known_keys(path: list[str]) -> list[str]:
    """The keys that may stand in the section at ``path`` ([] is the top)."""
    section: type[BaseModel] = TrainingConfig
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return []
        section = field.annotation
    return sorted(section.model_fields)
