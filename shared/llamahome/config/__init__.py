"""Configuration, three kinds kept apart: what to train, where a process runs, and recipes."""

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
    read_yaml_mapping,
    recipes,
    resolve_training_config,
)
from llamahome.config.training import TrainingConfig, parse_training_config

__all__ = [
    "DEFAULT_STATE",
    "Settings",
    "TrainingConfig",
    "load_recipe",
    "load_settings",
    "merge",
    "parse_assignments",
    "parse_training_config",
    "private_redis_socket",
    "read_yaml_mapping",
    "recipes",
    "resolve_training_config",
]
