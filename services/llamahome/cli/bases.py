"""A base model's folder: what must be in it and what must not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llamahome.errors import InvalidConfig, InvalidData, NotFound
from llamahome.storage.bases import base_digest, base_files

__all__ = ["base_digest", "base_name", "check_base", "check_name"]

# No ':' and no '/': the name stands in `ft:<base>:...`, which clients take apart at the colons, and
# in URL paths, where proxies decode %2F.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CODE_SUFFIXES = frozenset({".py", ".bin", ".pt", ".pkl"})


def check_name(name: str) -> str:
    """``name`` if it may be a base's public name. Raises InvalidConfig with an example."""
    if not _NAME.fullmatch(name):
        lowered = re.sub(r"[^a-z0-9._-]+", "-", name.rsplit("/", 1)[-1].lower()).strip("-._")[:64]
        example = f"For example {lowered}" if _NAME.fullmatch(lowered) else "For example qwen3-0.6b"
        raise InvalidConfig(
            f"{name!r} is not a base name: 1 to 64 of a-z 0-9 . _ -, a letter or digit first",
            field="NAME", remedy=example,
        )  # fmt: skip
    return name


def base_name(base: str) -> str:
    """What a base given as ``--base`` is called: a folder goes by its own name."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def check_base(folder: Path) -> None:
    """Raise unless ``folder`` can be a base: safetensors weights, a tokenizer, and no code.

    Raises NotFound for a missing folder or file, InvalidData naming the file that is refused.
    """
    if not folder.is_dir():
        raise NotFound("no such folder", file=str(folder), code="file_not_found")
    for path in base_files(folder):
        if path.suffix in _CODE_SUFFIXES:
            raise InvalidData(
                f"a {path.suffix} file can run code when it is loaded, so it is refused",
                file=str(path), code="unsafe_base", remedy="Keep safetensors and JSON files only",
            )  # fmt: skip
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise NotFound(
                f"holds no {name}", file=str(folder), code="file_not_found",
                remedy="Name the folder of a model as transformers saves it",
            )  # fmt: skip
    if not any(folder.glob("*.safetensors")):
        raise NotFound("holds no *.safetensors file", file=str(folder), code="file_not_found")
    for path in sorted(folder.glob("*config.json")):
        if _names_code(_json_object(path)):
            raise InvalidData(
                "auto_map would load code of the model's author, so it is refused",
                file=str(path), code="unsafe_base",
                remedy="Use a model that transformers itself implements",
            )  # fmt: skip


def _names_code(value: Any) -> bool:
    """Whether ``auto_map`` stands anywhere in it: composite models nest their configurations."""
    if isinstance(value, dict):
        return "auto_map" in value or any(_names_code(item) for item in value.values())
    return isinstance(value, list) and any(_names_code(item) for item in value)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidData(f"is not JSON ({error})", file=str(path)) from None
    if not isinstance(content, dict):
        raise InvalidData(f"must be a JSON object, not {type(content).__name__}", file=str(path))
    return content
