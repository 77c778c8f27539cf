"""Texts whose origin is followed through a chat template.

A template runs on :class:`Symbol` texts, which know, part by part, where they come from. Joining
and trimming keep the parts apart; any other string method makes one new part of the old ones; and
whatever the template finds out about a text (is it empty, does it hold "</think>") is kept as a
:class:`Guard`, so that what one row showed holds for every row on which the guards hold. In the
written text each :class:`Part` stands as one private character.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

FIRST_PRIVATE = 0xF0000
_MAX_PARTS = 60_000
_SLICE = "[:]"


class Untraceable(Exception):
    """The template does something with a text that cannot be followed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A text of the row (``message``, ``key``), or what ``method`` makes of ``source``.

    ``index`` takes one of several where the method gives a list.
    """

    message: int = -1
    key: str = ""
    source: Source = ()
    method: str = ""
    arguments: tuple[Any, ...] = ()
    index: int | None = None

    def origins(self) -> Iterator[tuple[int, str]]:
        """The (message, key) pairs that it is made of."""
        if self.message >= 0:
            yield self.message, self.key
        for part in self.source:
            if isinstance(part, Part):
                yield from part.origins()


Source: TypeAlias = "tuple[str | Part, ...]"
Texts: TypeAlias = Mapping[tuple[int, str], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """``method`` of the text ``source`` with ``arguments`` gave ``outcome`` (of a list: how many).

    Two guards are equal only where their outcomes have one type: 1 and True differ.
    """

    source: Source
    method: str
    arguments: tuple[Any, ...]
    outcome: bool | int

    def holds(self, texts: Texts) -> bool:
        """Whether it does for the row with these texts."""
        value = _call(resolve(self.source, texts), self.method, self.arguments)
        return bool((len(value) if isinstance(value, (list, tuple)) else value) == self.outcome)


def resolve(source: Iterable[str | Part], texts: Texts) -> str:
    """What ``source`` is in the row with these texts."""
    return "".join([part if isinstance(part, str) else value_of(part, texts) for part in source])


def value_of(part: Part, texts: Texts) -> str:
    """What one part is in the row with these texts."""
    if part.message >= 0:
        return texts[part.message, part.key]
    value = _call(resolve(part.source, texts), part.method, part.arguments)
    return str(value if part.index is None else value[part.index])


def _call(text: str, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "__bool__":
        return bool(text)
    if method == _SLICE:
        return text[slice(*arguments)]
    return getattr(text, method)(*arguments)


class Trace:
    """One row's way through a template: the parts met, each with its character, and the guards."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.guards: dict[Guard, None] = {}
        self._chars: dict[Part, str] = {}
        self._parts: list[Part] = []

    def symbol(self, message: int, key: str) -> Symbol:
        """The row's text at that place."""
        return Symbol(self, (Part(message, key),))

    def char(self, part: Part) -> str:
        """The private character of ``part``."""
        if part not in self._chars:
            if len(self._parts) >= _MAX_PARTS:
                raise Untraceable(f"more than {_MAX_PARTS} texts")
            self._chars[part] = chr(FIRST_PRIVATE + len(self._parts))
            self._parts.append(part)
        return self._chars[part]

    def part(self, char: str) -> Part | None:
        """The part that ``char`` stands for; None where the template itself wrote it."""
        place = ord(char) - FIRST_PRIVATE
        return self._parts[place] if 0 <= place < len(self._parts) else None

    def observe(self, source: Source, method: str, arguments: tuple[Any, ...] = ()) -> Any:
        """Call ``method`` on the real text, with a guard where the answer is no text."""
        value = _call(resolve(source, self.texts), method, arguments)
        if isinstance(value, str):
            return value
        if value is NotImplemented:  # a comparison with something that is no text
            return value
        outcome = len(value) if isinstance(value, (list, tuple)) else value
        if not isinstance(outcome, (bool, int)):
            raise Untraceable(f"{method} of a text gives a {type(value).__name__}")
        self.guards[Guard(source, method, arguments, outcome)] = None
        return value


class Symbol(str):
    """A text of known origin. What C code sees of it are its parts' private characters."""

    trace: Trace
    parts: Source

    def __new__(cls, trace: Trace, parts: Source) -> Symbol:
        written = "".join(part if isinstance(part, str) else trace.char(part) for part in parts)
        self = super().__new__(cls, written)
        self.trace, self.parts = trace, parts
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        # Answered without a guard where the template's own text decides it.
        own = any(isinstance(part, str) and part for part in self.parts)
        return own or bool(self.trace.observe(self.parts, "__bool__"))

    def __getitem__(self, place: Any) -> str:
        if isinstance(place, slice):
            return str(self._called(_SLICE, (place.start, place.stop, place.step)))
        return str(self._called("__getitem__", (place,)))

    def strip(self, chars: str | None = None, /) -> str:
        if len(self.parts) == 1 and isinstance(self.parts[0], Part):
            return _trimmed(self, "strip", chars)
        return _trimmed(_trimmed(self, "lstrip", chars), "rstrip", chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return _trimmed(self, "lstrip", chars)

    def rstrip(self, chars: str | None = None, /) -> str:
        return _trimmed(self, "rstrip", chars)

    def _called(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if any(holds_symbol(argument) for argument in arguments):
            raise Untraceable(f"{method} of a text with a text of the row")
        value = self.trace.observe(self.parts, method, arguments)
        if isinstance(value, str):
            return Symbol(self.trace, (Part(-1, "", self.parts, method, arguments),))
        if isinstance(value, (list, tuple)):
            return [
                Symbol(self.trace, (Part(-1, "", self.parts, method, arguments, index),))
                for index in range(len(value))
            ]
        return value


def _trimmed(text: Symbol, method: str, chars: str | None) -> Symbol:
    """Trims part by part, so that the template's own text stays apart from the row's."""
    if holds_symbol(chars):
        raise Untraceable(f"{method} of a text with a text of the row")
    parts, place = list(text.parts), -1 if method == "rstrip" else 0
    while parts:
        part = parts[place]
        kept: str | Part
        if isinstance(part, str):
            kept = getattr(part, method)(chars)
            some = bool(kept)
        else:
            kept = Part(-1, "", (part,), method, (chars,))
            some = text.trace.observe((kept,), "__bool__")
        if some:
            parts[place] = kept
            break
        del parts[place]
    return Symbol(text.trace, tuple(parts))


def joined(pieces: Iterable[Any]) -> str:
    """``"".join`` that keeps symbols."""
    texts = [str(piece) for piece in pieces]
    trace = next((text.trace for text in texts if isinstance(text, Symbol)), None)
    if trace is None:
        return "".join(texts)
    parts: list[str | Part] = []
    for text in texts:
        parts += text.parts if isinstance(text, Symbol) else (text,)
    return Symbol(trace, tuple(parts))


def plain(text: str) -> str:
    """The text as C code sees it: private characters for parts."""
    return str.__str__(text)


def holds_symbol(value: Any) -> bool:
    """Whether a symbol stands anywhere in a value of a template."""
    if isinstance(value, Symbol):
        return True
    if isinstance(value, dict):
        return any(holds_symbol(key) or holds_symbol(item) for key, item in value.items())
    return isinstance(value, (list, tuple)) and any(map(holds_symbol, value))


def _asks(method: str) -> Callable[..., Any]:
    def ask(self: Symbol, *arguments: Any, **named: Any) -> Any:
        if named:
            raise Untraceable(f"{method} of a text with named arguments")
        return self._called(method, arguments)

    ask.__name__ = method
    return ask


def _refuses(method: str) -> Callable[..., Any]:
    def refuse(self: Symbol, *arguments: Any, **named: Any) -> NoReturn:
        raise Untraceable(f"{method} of a text")

    refuse.__name__ = method
    return refuse


def _cover_every_method() -> None:
    """No method of ``str`` may ever run on the private characters."""
    refused = {
        "__iter__", "__hash__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__format__",
        "__repr__", "format", "format_map", "join", "encode", "maketrans", "translate",
    }  # fmt: skip
    asked = {"__len__", "__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    asked |= {name for name in dir(str) if not name.startswith("_")}
    for method in refused:
        setattr(Symbol, method, _refuses(method))
    for method in asked - refused - set(vars(Symbol)):
        setattr(Symbol, method, _asks(method))


_cover_every_method()
