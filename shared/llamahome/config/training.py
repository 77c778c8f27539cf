"""``TrainingConfig``: what to train. The same schema checks the file, ``--set`` and job payloads.

Types are strict on purpose: a bool is no number, "yes" is no bool, 4.0 is no int. The one leniency
is ``learning_rate: 5e-5``, which YAML 1.1 reads as a string and everybody means as a number.
"""

from __future__ import annotations

import re
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

from llamahome.errors import InvalidConfig, nearest

MIN_MAX_LENGTH = 8  # the least that can hold a turn
_EXPONENT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """``"5e-5"`` -> 5e-05, int -> float; anything else is left to the strict check."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


Number = Annotated[StrictFloat, Field(allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[StrictInt, Field(ge=1)]


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

    @field_validator("target_modules", mode="before")
    @classmethod
    def _modules(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(f'must be a list of module names or "all-linear", not {value!r}')
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError("must name at least one module")
            twice = sorted(
                {name for name in value if isinstance(name, str) and value.count(name) > 1}
            )
            if twice:
                raise ValueError(f"names {', '.join(twice)} twice")
            return tuple(value)
        return value

    @field_validator("bias")
    @classmethod
    def _bias(cls, value: str) -> str:
        if value in ("all", "lora_only"):
            raise ValueError(
                f"{value!r} would train the base's own bias terms, and the adapter could no longer "
                'be combined with others or served beside them; only "none" is supported'
            )
        if value != "none":
            raise ValueError(f'must be "none", not {value!r}')
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
    max_line_bytes: Positive = 16 * 1024 * 1024


class TrainingConfig(Section):
    """Everything that decides what comes out, and nothing about where it runs."""

    batch_size: Positive = 4
    max_workers: Positive = 4
    max_length: Annotated[StrictInt, Field(ge=MIN_MAX_LENGTH)] = 512
    validation_split: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    epochs: Positive = 3
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 100
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    gradient_accumulation_steps: Positive = 4
    fp16: StrictBool = True
    lora: LoraConfig = LoraConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()

    seed: Annotated[StrictInt, Field(ge=0, le=2_147_483_647)] = 42
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
        """``logging.eval_steps`` is an alias of ``eval_steps``; two values are an error."""
        if not isinstance(value, dict) or not isinstance(value.get("logging"), dict):
            return value
        if "eval_steps" not in value["logging"]:
            return value
        logging = dict(value["logging"])
        alias = logging.pop("eval_steps")
        if value.get("eval_steps", alias) != alias:
            raise ValueError(f"eval_steps is {value['eval_steps']}, logging.eval_steps is {alias}")
        return {**value, "logging": logging, "eval_steps": alias}


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
    value = problem.get("input")
    shown = "" if isinstance(value, dict) or repr(value) in message else f", not {value!r}"
    return InvalidConfig(message[0].lower() + message[1:] + shown, file=source, field=field or None)


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
