"""Configuration, three kinds kept apart: what to train, where a process runs, and recipes."""

from llamahome.config.adapters import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    EarlierAdapter,
    read_adapter_config,
)
from llamahome.config.registry import BaseSource, ModelRegistry, load_registry
from llamahome.config.settings import (
    DEFAULT_STATE,
    Settings,
    load_settings,
    private_redis_socket,
)
from llamahome.config.sources import (
    load_recipe,
    merge,
    parse_assignments,
    recipes,
    resolve_training_config,
)
from llamahome.config.strict_yaml import read_yaml_mapping
from llamahome.config.training import TrainingConfig, parse_training_config

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_WEIGHTS_NAME",
    "BaseSource",
    "DEFAULT_STATE",
    "EarlierAdapter",
    "ModelRegistry",
    "Settings",
    "TrainingConfig",
    "load_recipe",
    "load_registry",
    "load_settings",
    "merge",
    "parse_assignments",
    "parse_training_config",
    "private_redis_socket",
    "read_adapter_config",
    "read_yaml_mapping",
    "recipes",
    "resolve_training_config",
]
