"""YAML as people write settings in it: plain values, each key once, and nothing that explodes.

Refused, with file and line: a key twice in one mapping, tags (but ``!!str``), a collection that
holds itself, nesting deeper than MAX_DEPTH.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from llamahome.errors import InvalidConfig, NotFound

MAX_DEPTH = 32
MAX_INTEGER_BITS = 4096  # Python does not print much larger ones
# libyaml's loader is several times faster, and settings are read for every job that is accepted;
# both are safe ones, which make nothing but plain values.
_SAFE: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAGS = (None, "!", "tag:yaml.org,2002:str")


class _Loader(_SAFE):  # type: ignore[misc, valid-type]
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value that looks like a date or a number and is none is an error at its line."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise _problem(str(error), node) from None
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise _problem(f"an integer of {value.bit_length()} bits", node)
        return value


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that must hold a mapping or nothing.

    Raises NotFound, and InvalidConfig with the line.
    """
    return parse_yaml_mapping(read_text(path), source=str(path))


def read_text(path: Path) -> str:
    """A UTF-8 file, without its byte order mark. Raises NotFound, InvalidConfig."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if path.is_symlink():
            raise InvalidConfig(
                f"is a link to {path.readlink()}, which is not there", file=str(path),
                remedy="Put the file there, or remove the link",
            ) from None  # fmt: skip
        raise NotFound("no such file", file=str(path), code="file_not_found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"cannot be read ({error})", file=str(path)) from None


def is_there(path: Path) -> bool:
    """Whether something bears the name of a file that may be missing; a dangling link does.

    Raises InvalidConfig where that cannot be seen.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InvalidConfig(f"cannot be read ({error})", file=str(path)) from None
    return True


def parse_yaml_mapping(text: str, *, source: str) -> dict[str, Any]:
    """Raises InvalidConfig naming ``source`` and the line."""
    content = parse_yaml(text, source=source)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidConfig(f"must be a mapping, not {type(content).__name__}", file=source)
    for key in content:
        if not isinstance(key, str):
            raise InvalidConfig(
                f"keys must be text, not {key!r}", file=source, remedy="Write it in quotes"
            )
    return content


def parse_yaml(text: str, *, source: str) -> Any:
    """Plain values: dict, list, str, int, float, bool, date, datetime, None.

    Raises InvalidConfig naming ``source`` and the line.
    """
    try:
        _check(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        # A character that YAML does not allow has a reason instead.
        problem = getattr(error, "problem", None) or getattr(error, "reason", "cannot be parsed")
        raise InvalidConfig(f"broken YAML: {problem}", file=source, line=line) from None
    except UnicodeEncodeError:
        raise InvalidConfig("broken YAML: half a surrogate pair is no text", file=source) from None


@dataclasses.dataclass
class _Open:
    """A collection whose end has not been seen, and the levels below it."""

    anchor: str | None
    height: int = 0

    def take(self, child: yaml.Event, height: int) -> None:
        """A child that is complete; its own levels count."""
        self.height = max(self.height, height)


@dataclasses.dataclass
class _OpenMapping(_Open):
    keys: set[str] = dataclasses.field(default_factory=set)
    at_key: bool = True

    def take(self, child: yaml.Event, height: int) -> None:
        super().take(child, height)
        if self.at_key and isinstance(child, yaml.ScalarEvent):
            if child.value in self.keys:
                raise _problem(f"the key {child.value!r} stands here twice", child)
            self.keys.add(child.value)
        self.at_key = not self.at_key


def _check(text: str) -> None:
    """Raises YAMLError for what is refused.

    It goes by the parser's events, for libyaml's recursion on nested collections has no bound.
    """
    waiting: list[_Open] = []
    heights: dict[str | None, int] = {}  # of anchored collections
    for event in yaml.parse(text, Loader=_SAFE):
        if (tag := getattr(event, "tag", None)) not in _PLAIN_TAGS:
            raise _problem(f"the tag {tag} is not supported", event)
        if isinstance(event, yaml.CollectionStartEvent):
            kind = _OpenMapping if isinstance(event, yaml.MappingStartEvent) else _Open
            waiting.append(kind(event.anchor))
        height = 0
        if isinstance(event, yaml.AliasEvent):
            if any(each.anchor == event.anchor for each in waiting):
                raise _problem(f"*{event.anchor} stands within itself", event)
            height = heights.get(event.anchor, 0)
        if len(waiting) + height > MAX_DEPTH:
            raise _problem(f"is nested deeper than {MAX_DEPTH} levels", event)
        if isinstance(event, yaml.CollectionEndEvent):
            closed = waiting.pop()
            height = closed.height + 1
            if closed.anchor is not None:
                heights[closed.anchor] = height
        if waiting and isinstance(event, _COMPLETE):
            waiting[-1].take(event, height)


# Events after which a child of the collection that is open then is complete.
_COMPLETE = (yaml.ScalarEvent, yaml.AliasEvent, yaml.CollectionEndEvent)


def _problem(what: str, place: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    mark: Any = place.start_mark  # libyaml has a class of its own for it
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)
