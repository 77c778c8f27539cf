"""A model's name and version: checked, and the base that they mean."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from llamahome.config import load_registry
from llamahome.errors import InvalidConfig, InvalidState, NotFound
from llamahome.local.files import base_of_folder
from llamahome.local.tree import Tree
from llamahome.schemas import BaseRef

# It becomes part of file names: no separator, nothing hidden, no "..".
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Model:
    """A checked name and version; ``label`` is what its files are called."""

    name: str
    version: str

    @property
    def label(self) -> str:
        return f"{self.name}_{self.version}"

    @property
    def title(self) -> str:
        return f"{self.name}-{self.version}"


def checked_name(value: object, field: str) -> str:
    """Raises InvalidConfig naming the field."""
    if not isinstance(value, str):
        remedy = f"Write {str(value)!r}" if isinstance(value, (int, float)) else None
        raise InvalidConfig(f"must be text, not {value!r}", field=field, remedy=remedy)
    if not _NAME.fullmatch(value):
        raise InvalidConfig(
            f"{value!r} is no name", field=field,
            remedy="Use up to 100 letters, digits, '.', '_' and '-', beginning with a letter or "
            "digit",
        )  # fmt: skip
    return value


def find_model(tree: Tree, name: object, version: object) -> Model:
    """The checked model. Without a version: the registry's default, or the only one that is there.

    Raises InvalidConfig, NotFound naming those there are.
    """
    model = checked_name(name, "model_name")
    if version is not None:
        return Model(model, checked_name(version, "model_version"))
    default = load_registry().default_version(model)
    if default is not None:
        return Model(model, checked_name(default, f"models.{model}.default_version"))
    there = sorted(path.name for path in (tree.models / model).glob("*") if _is_base(path))
    if len(there) == 1:
        return Model(model, there[0])
    raise NotFound(
        f"{model!r} has no default version" + (f"; there are {', '.join(there)}" if there else ""),
        code="model_not_found", field="model_version",
        remedy="Name a version, or a default_version in configs/models.yaml",
    )  # fmt: skip


def find_base(tree: Tree, model: Model) -> BaseRef:
    """The base, hashed. Raises NotFound, naming where it was looked for, and InvalidState."""
    source = load_registry().source(model.name, model.version)
    if source is not None and source.hub is not None:
        folder = _from_hub(source.hub, source.revision)
    elif source is not None and source.path is not None:
        folder = source.path
    else:
        folder = tree.models / model.name / model.version
    if not _is_base(folder):
        raise NotFound(
            f"{model.name!r} {model.version!r} is not there", file=str(folder),
            code="model_not_found",
            remedy="Put the model's folder there, as transformers saves it, or name its place in "
            "configs/models.yaml",
        )  # fmt: skip
    return base_of_folder(folder).model_copy(update={"name": model.title})


def _is_base(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _from_hub(repository: str, revision: str | None) -> Path:
    """The copy on this machine, fetched where there is none and that is allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kinds = ["*.safetensors", "*.json", "*.jinja"]
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=kinds))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InvalidState(
            f"cannot be fetched: {error}", file=repository, code="model_not_found",
            remedy="Download it where there is a network, and name its folder as path",
        ) from error  # fmt: skip
