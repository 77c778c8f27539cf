"""``adapter_config.json`` of an adapter to go on from, as PEFT and this project write it.

What is read of it decides what its weights mean, so a job that goes on from it keeps all of that.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from llamahome.config.training import LoraConfig, TrainingConfig, parse_training_config, shown
from llamahome.errors import InvalidConfig

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

# What PEFT can do and this engine cannot go on from, where it is set to anything.
_MUST_BE_EMPTY = (
    "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "exclude_modules", "layer_replication", "target_parameters",
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens",
    "megatron_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# Other ways to begin (PiSSA and its kin) take something out of the base's own weights.
_LEAVES_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class EarlierAdapter:
    """The LoRA of an adapter: W + scale B A on every layer whose path ends in a target module.

    ``tokens`` are the ids that have rows of their own in it (``template: markers``), ascending.
    """

    name: str
    base: str | None
    r: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    tokens: tuple[int, ...] = ()

    @property
    def layer(self) -> dict[str, Any]:
        """Its values as nested training settings, to lie below those a submission gives."""
        lora = {
            "r": self.r,
            "alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "target_modules": list(self.target_modules),
        }
        return {"lora": lora} | ({"template": "markers"} if self.tokens else {})

    def check(self, config: TrainingConfig) -> None:
        """Raises InvalidConfig, naming both values, where ``config`` would give it another meaning.

        ``all-linear`` is a question to the base; the engine answers it by the weights' names.
        """
        lora = config.lora
        template = "markers" if self.tokens else config.template
        for field, asked, has in (
            ("lora.r", lora.r, self.r),
            ("lora.alpha", lora.alpha, self.alpha),
            ("lora.use_rslora", lora.use_rslora, self.use_rslora),
            ("lora.target_modules", _modules(lora), sorted(self.target_modules)),
            ("template", config.template, template),
        ):
            if asked != has and asked != "all-linear":
                raise InvalidConfig(
                    f"is {asked!r}, but the adapter {self.name!r} was trained with {has!r}",
                    code="adapter_mismatch", file="config", field=field,
                    remedy="Leave it out: a continued adapter keeps its own",
                )  # fmt: skip


def read_adapter_config(content: bytes, name: str) -> EarlierAdapter:
    """The bytes of an ``adapter_config.json``; ``name`` is what error texts call the adapter.

    Raises InvalidConfig for what is no adapter, or one that cannot be gone on from.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unusable(name, f"has a broken {ADAPTER_CONFIG_NAME} ({error})") from None
    if not isinstance(body, dict):
        raise _unusable(name, f"has no object in its {ADAPTER_CONFIG_NAME}")
    if body.get("peft_type") != "LORA":
        raise _unusable(name, f"is of type {shown(body.get('peft_type'))}; only LORA is supported")
    if body.get("bias", "none") != "none":
        raise _unusable(name, f"has bias {shown(body['bias'])}; only 'none' is supported")
    _check_plain(body, name)
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in body:
            raise _unusable(name, f"has no {key} in its {ADAPTER_CONFIG_NAME}")
    lora = _lora(body, name)
    base = body.get("base_model_name_or_path")
    return EarlierAdapter(
        name, base if isinstance(base, str) else None, lora.r, lora.alpha, lora.use_rslora,
        tuple(lora.target_modules), _tokens(body.get("trainable_token_indices"), name),
    )  # fmt: skip


def _check_plain(body: dict[str, Any], name: str) -> None:
    for key in _MUST_BE_EMPTY:
        if body.get(key):
            raise _unusable(name, f"has {key} {shown(body[key])}, which is not supported")
    start = body.get("init_lora_weights", True)
    if start not in _LEAVES_THE_BASE:
        raise _unusable(
            name, f"began with init_lora_weights {shown(start)}, which changes the base"
        )


def _lora(body: dict[str, Any], name: str) -> LoraConfig:
    modules = body["target_modules"]
    if not isinstance(modules, list) or not all(isinstance(each, str) for each in modules):
        raise _unusable(name, f"has target_modules {shown(modules)}, which is no list of names")
    values = {
        "r": body["r"], "alpha": body["lora_alpha"], "target_modules": sorted(modules),
        "use_rslora": body.get("use_rslora", False),
    }  # fmt: skip
    return parse_training_config({"lora": values}, source=f"adapter {name}").lora


def _tokens(value: Any, name: str) -> tuple[int, ...]:
    """PEFT has a list of ids, or one for each matrix; row i of the weights is that of id i."""
    if value is None:
        return ()
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if not all(_ascending_ids(ids) and ids == lists[0] for ids in lists):
        raise _unusable(
            name, f"has trainable_token_indices {shown(value)}, which is no list of ascending ids"
        )
    return tuple(lists[0]) if lists else ()


def _ascending_ids(value: Any) -> bool:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        return False
    return all(low < high for low, high in zip([-1, *value], value, strict=False))


def _modules(lora: LoraConfig) -> str | list[str]:
    modules = lora.target_modules
    return modules if isinstance(modules, str) else sorted(modules)


def _unusable(name: str, why: str) -> InvalidConfig:
    return InvalidConfig(
        f"adapter {name!r} {why}", code="invalid_adapter", field="model",
        remedy="Name another adapter, or a base",
    )  # fmt: skip
