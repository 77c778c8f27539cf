"""A chat template compiled to run on symbols (``symbolic``).

The environment is that of ``templates``; what would lose a text's origin (``~``, captured blocks,
``join``) keeps it here, and what would read a text behind its back is refused. A wrong answer is
still caught: nothing that is learned here is used before it was proven (``fast``).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from llamahome.conversations.symbolic import Symbol, Untraceable, holds_symbol, joined

# Filters and tests that only call a text's methods, or never look at texts in the lists they get.
_OF_TEXT = {"trim", "string", "upper", "lower", "capitalize", "replace", "length", "count"}
_OF_VALUES = {
    "default", "d", "list", "first", "last", "reverse", "select", "reject", "selectattr",
    "rejectattr", "map", "length", "count", "items", "safe", "batch", "slice",
}  # fmt: skip
_TESTS = {
    "defined", "undefined", "none", "string", "mapping", "number", "boolean", "true", "false",
    "integer", "float", "callable", "eq", "equalto", "==", "ne", "!=", "sameas",
}  # fmt: skip
_ALWAYS = {"iterable": True, "sequence": True}


class FollowingEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of ``templates``, with symbols kept."""

    concat = staticmethod(joined)
    joined = staticmethod(lambda *values: joined(values))

    @staticmethod
    def holds(needle: Any, hay: Any) -> bool:
        """``needle in hay``."""
        if isinstance(needle, Symbol) and isinstance(hay, str):
            raise Untraceable("a text of the row is looked for in another")
        return needle in hay

    def call(
        __self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, Symbol) and __obj.__name__ in ("format", "format_map"):
            raise Untraceable("a text of the row as a format")
        behind = isinstance(__obj, (types.BuiltinMethodType, type)) and not isinstance(owner, dict)
        if behind and holds_symbol([args, kwargs]):
            raise Untraceable(f"a text of the row goes into {getattr(__obj, '__name__', __obj)}")
        return super().call(__context, __obj, *args, **kwargs)


def follow(environment: jinja2.Environment, source: str) -> jinja2.Template:
    """Compile ``source`` in ``environment``, which must be a :class:`FollowingEnvironment`."""
    environment.filters = {
        name: _guarded_filter(name, function) for name, function in environment.filters.items()
    }
    tests: Any = environment.tests
    environment.tests = {name: _guarded_test(name, function) for name, function in tests.items()}
    tree = _Keeping().visit(environment.parse(source))
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


class _Keeping(jinja2.visitor.NodeTransformer):
    """``a ~ b`` and ``a in b`` as calls that keep, or refuse, symbols."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        self.generic_visit(node)
        if len(node.ops) != 1 or node.ops[0].op not in ("in", "notin"):
            return node
        found = _call("holds", [node.expr, node.ops[0].expr], node)
        return found if node.ops[0].op == "in" else jinja2.nodes.Not(found).set_lineno(node.lineno)


def _call(name: str, arguments: list[Any], at: jinja2.nodes.Node) -> jinja2.nodes.Expr:
    function = jinja2.nodes.EnvironmentAttribute(name)
    call = jinja2.nodes.Call(function, arguments, [], None, None)
    call.set_lineno(at.lineno)
    function.set_lineno(at.lineno)
    return call


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, rest = args[skip], [args[skip + 1 :], kwargs]
        if not holds_symbol(value) and not holds_symbol(rest):
            return function(*args, **kwargs)
        if name == "join" and not kwargs and len(args) <= skip + 2:
            return _join(value, args[skip + 1] if len(args) > skip + 1 else "")
        fine = name in _OF_TEXT if isinstance(value, Symbol) else False
        if (fine and not holds_symbol(rest)) or name in _OF_VALUES:
            return function(*args, **kwargs)
        raise Untraceable(f"a text of the row goes through the filter {name}")

    return guarded


def _join(values: Any, separator: str) -> str:
    pieces: list[Any] = []
    for value in values:
        pieces += [separator, value] if pieces else [value]
    return joined(pieces)


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[skip], Symbol):
            if name in _ALWAYS:
                return _ALWAYS[name]
            if name == "in":
                return FollowingEnvironment.holds(*args[skip:])
            if name not in _TESTS:
                raise Untraceable(f"a text of the row goes through the test {name}")
        return function(*args, **kwargs)

    return guarded
