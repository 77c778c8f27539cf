"""The files of a base's tokenizer: which there are, and their contents."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llamahome.errors import InvalidConfig, NotFound
from llamahome.schemas import JsonObject

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"
NAMES_JSON = "special_tokens_map.json"
ADDED_JSON = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DECODER = "added_tokens_decoder"
_FILES = (TOKENIZER_JSON, CONFIG_JSON, NAMES_JSON, ADDED_JSON, TEMPLATE_FILE)


@dataclasses.dataclass(frozen=True, slots=True)
class JsonFile:
    """A JSON object, and the ``file`` that messages name for it."""

    file: str
    content: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class BaseFiles:
    """What is read of a base's tokenizer. ``names`` and ``added`` are special_tokens_map.json and
    added_tokens.json where these count; ``templates`` those in files of their own, by name.
    """

    document: JsonFile
    config: JsonFile
    names: JsonFile | None = None
    added: JsonFile | None = None
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)


def tokenizer_files(base_dir: Path) -> dict[str, Path]:
    """The base's tokenizer files that are there, by their names below its folder, in a fixed order;
    tokenizer.json must be.

    Raises NotFound (no such folder) and InvalidConfig (no tokenizer.json), with the remedy.
    """
    if not base_dir.is_dir():
        raise NotFound(
            "the base's folder is not there", code="model_not_found", file=str(base_dir),
            remedy="Mount it on this worker, or register the base again with its new folder",
        )  # fmt: skip
    found = {name: base_dir / name for name in _FILES if (base_dir / name).is_file()}
    if TOKENIZER_JSON not in found:
        raise InvalidConfig(
            "the base has no tokenizer.json", code="invalid_base", file=str(base_dir),
            remedy="Save its tokenizer once with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)",
        )  # fmt: skip
    templates = sorted((base_dir / TEMPLATE_FOLDER).glob("*.jinja"))
    return found | {f"{TEMPLATE_FOLDER}/{path.name}": path for path in templates if path.is_file()}


def read_files(base_dir: Path) -> BaseFiles:
    """The contents of a base's tokenizer files. Raises NotFound, and InvalidConfig naming the file.

    As in transformers, special_tokens_map.json and added_tokens.json count only where the
    configuration has no added_tokens_decoder.
    """
    paths = tokenizer_files(base_dir)
    config = JsonFile(CONFIG_JSON, {})
    if CONFIG_JSON in paths:
        config = _read_json(paths[CONFIG_JSON])
    legacy = {} if DECODER in config.content else paths
    return BaseFiles(
        document=_read_json(paths[TOKENIZER_JSON]),
        config=config,
        names=_read_json(legacy[NAMES_JSON]) if NAMES_JSON in legacy else None,
        added=_read_json(legacy[ADDED_JSON]) if ADDED_JSON in legacy else None,
        templates=_templates(paths),
    )


def _templates(paths: Mapping[str, Path]) -> dict[str, str]:
    found = {}
    for name, path in paths.items():
        if name == TEMPLATE_FILE:
            found["default"] = _text(path)
        elif path.parent.name == TEMPLATE_FOLDER:
            found[path.name.removesuffix(".jinja")] = _text(path)
    return found


def read_bytes(path: Path) -> bytes:
    """Raises InvalidConfig."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise invalid(f"cannot be read: {error.strerror}", str(path)) from None


def read_object(path: Path) -> JsonObject:
    """A file that holds a JSON object. Raises InvalidConfig."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise invalid(f"broken JSON: {error}", str(path)) from None
    if not isinstance(content, dict):
        raise invalid("must be a JSON object", str(path))
    return content


def tokenizer_of(document: JsonFile, **replaced: None) -> Tokenizer:
    """The tokenizer that tokenizer.json describes, without the parts that are ``replaced``.

    Raises InvalidConfig.
    """
    with refusals("the tokenizer cannot be read", document.file):
        return Tokenizer.from_str(json.dumps({**document.content, **replaced}))


@contextlib.contextmanager
def refusals(message: str, file: str) -> Iterator[None]:
    """What the tokenizers library raises in here becomes InvalidConfig: bare Exceptions, and its
    panics, which are none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise invalid(f"{message}: {error}", file) from None
        raise


def invalid(
    message: str, file: str, field: str | None = None, remedy: str | None = None
) -> InvalidConfig:
    """The error for a base that cannot be used as it is."""
    return InvalidConfig(message, code="invalid_base", file=file, field=field, remedy=remedy)


def _read_json(path: Path) -> JsonFile:
    return JsonFile(str(path), read_object(path))


def _text(path: Path) -> str:
    """With every line's end as ``\\n``, as transformers reads it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"is not UTF-8: {error}", str(path), remedy="Save it as UTF-8") from None
    except OSError as error:
        raise invalid(f"cannot be read: {error.strerror}", str(path)) from None
