"""``configs/models.yaml``: which base a model's name and version mean, for the one-machine facade.

::

    models:
      llama:
        default_version: "3.3-7b"
        versions:
          "3.3-7b": {path: /srv/models/llama-3.3-7b}
          "3.1-8b": {hub: meta-llama/Llama-3.1-8B-Instruct, revision: main}

A version that is not listed lies in ``<data_dir>/models/<name>/<version>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from llamahome.config.strict_yaml import is_there, read_yaml_mapping
from llamahome.errors import InvalidConfig

REGISTRY_PATH = Path("configs/models.yaml")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSource(_Section):
    """A folder (a relative one is below the working folder), or a repository of the model hub."""

    path: Path | None = None
    hub: StrictStr | None = None
    revision: StrictStr | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("must have either path or hub")
        return self


class RegisteredModel(_Section):
    default_version: StrictStr | None = None
    versions: dict[StrictStr, BaseSource] = Field(default_factory=dict)


class ModelRegistry(_Section):
    models: dict[StrictStr, RegisteredModel] = Field(default_factory=dict)

    def default_version(self, model: str) -> str | None:
        """None where the registry does not say."""
        return self.models[model].default_version if model in self.models else None

    def source(self, model: str, version: str) -> BaseSource | None:
        """None where the registry does not list it."""
        return self.models[model].versions.get(version) if model in self.models else None


def load_registry(file: Path | None = None) -> ModelRegistry:
    """The registry in ``file``, by default ``configs/models.yaml``, which may be missing.

    Raises InvalidConfig naming the file and the field.
    """
    path = file or REGISTRY_PATH
    if file is None and not is_there(path):
        return ModelRegistry()
    try:
        return ModelRegistry.model_validate(read_yaml_mapping(path))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        shown = problem.get("input")
        remedy = None
        if isinstance(shown, (int, float)) and not isinstance(shown, bool):
            remedy = f'Write it in quotes, "{shown}": YAML takes it for a number'
        raise InvalidConfig(
            problem["msg"].removeprefix("Value error, "), file=str(path), field=field, remedy=remedy
        ) from None
