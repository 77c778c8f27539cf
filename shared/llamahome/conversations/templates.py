"""Chat templates: the base's own Jinja template, rendered as transformers renders it.

The environment is the one of ``transformers.utils.chat_template_utils`` (5.x): immutable sandbox,
``trim_blocks``, ``lstrip_blocks``, loop controls, ``raise_exception``, ``strftime_now``, a
``tojson`` without HTML escapes, and ``{% generation %}``, whose extents are kept as character
spans. Templates come with models, so they are code from elsewhere: their size and the size of what
they write are bounded.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from llamahome.conversations.conversation import Conversation
from llamahome.conversations.following import FollowingEnvironment, follow
from llamahome.conversations.symbolic import FIRST_PRIVATE, Trace, Untraceable, plain
from llamahome.errors import InvalidConfig
from llamahome.schemas import JsonObject

MAX_TEMPLATE_CHARS = 512 * 1024
MAX_RENDERED_CHARS = 64 * 1024 * 1024
Span = tuple[int, int]
# The texts of a message whose way through the template is followed.
FOLLOWED = ("content", "reasoning_content")

# For a base without a template: plain text and the special tokens it already has, so that no
# embedding is resized. What is generated ends with the end-of-sequence token.
FALLBACK_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{- "Tools:\\n" + (tools | tojson) + "\\n\\n" }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {{- message.content + "\\n\\n" }}
    {%- elif message.role == "assistant" %}
        {{- "Assistant:\\n" }}
        {%- generation %}
            {{- message.content or "" }}
            {%- if message.tool_calls %}{{- message.tool_calls | tojson }}{%- endif %}
            {{- eos_token }}
        {%- endgeneration %}
        {{- "\\n\\n" }}
    {%- else %}
        {{- message.role | capitalize + ":\\n" + message.content + "\\n\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "Assistant:\\n" }}{%- endif %}
"""


class TemplateRefused(Exception):
    """The template cannot render this conversation; the message is the template's own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """Text, and the [start, end) character spans of its ``{% generation %}`` blocks, in order."""

    text: str
    generations: tuple[Span, ...] = ()


class ChatTemplate:
    """A compiled template. ``variables`` are the special tokens (bos_token, ...) it may name.

    ``today`` fixes what ``strftime_now`` answers, so that one job's rows all carry one date; by
    default it is the clock. Safe to share between threads.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str] | None = None,
        *,
        today: datetime.datetime | None = None,
    ) -> None:
        """Raises InvalidConfig where the template is too large or is no Jinja."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InvalidConfig(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS}",
                code="invalid_base", field="chat_template",
            )  # fmt: skip
        self.source = source
        self._variables = dict(variables or {})
        self._now = lambda: today or datetime.datetime.now()
        self._following: jinja2.Template | None = None
        environment = _prepared(jinja2.sandbox.ImmutableSandboxedEnvironment, self._now)
        try:
            self._template = environment.from_string(source)
            self._literals = "\0".join(_literals(environment.parse(source)))
        # Python refuses in its own way what nests too deeply.
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise InvalidConfig(
                f"the chat template cannot be read: {error}", code="invalid_base",
                field="chat_template", line=getattr(error, "lineno", None),
            ) from None  # fmt: skip
        self.marks_generations: bool = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))
        self.uses_clock = "strftime_now" in source
        self.digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()

    def writes(self, token: str) -> bool:
        """Whether ``token`` stands in the template's own text or string literals."""
        return token in self._literals

    def render(
        self, conversation: Conversation, *, turns: int | None = None, prompt: bool = False
    ) -> Rendered:
        """Render the first ``turns`` messages (None: all), with the generation prompt or without.

        Raises TemplateRefused.
        """
        messages = [_as_seen(message) for message in conversation.messages[:turns]]
        return self._run(self._template, messages, conversation, prompt)

    def follow(
        self, conversation: Conversation, trace: Trace, *, turns: int | None, prompt: bool
    ) -> Rendered:
        """As :meth:`render`, on the symbols of the messages' texts: one private character a part.

        Raises TemplateRefused, and Untraceable where a text cannot be followed.
        """
        if self._following is None:
            if any(ord(char) >= FIRST_PRIVATE for char in self.source + repr(self._variables)):
                raise Untraceable("the template has private characters of its own")
            environment = _prepared(FollowingEnvironment, self._now)
            self._following = follow(environment, self.source)
        messages = []
        for number, message in enumerate(conversation.messages[:turns]):
            symbols = {
                key: trace.symbol(number, key) for key in FOLLOWED if (number, key) in trace.texts
            }
            messages.append(_as_seen({**message, **symbols}))
        return self._run(self._following, messages, conversation, prompt)

    def _run(
        self, template: jinja2.Template, messages: list[JsonObject], row: Conversation, prompt: bool
    ) -> Rendered:
        tracker = _Tracker()
        context = {
            **self._variables,
            "messages": messages,
            "tools": list(row.tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            _TRACKER: tracker,
        }
        try:
            for block in template.generate(context):
                tracker.write(plain(block))
        except (TemplateRefused, Untraceable):
            raise
        except Exception as error:  # a template may fail in any way; the row says how
            raise TemplateRefused(f"{type(error).__name__}: {error}") from None
        return tracker.rendered()


_TRACKER = "_llamahome_tracker"


class _Tracker:
    """Gathers one rendering's blocks and generation spans."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._length = 0
        self._generations: list[tuple[int, str]] = []

    def write(self, block: str) -> None:
        self._length += len(block)
        if self._length > MAX_RENDERED_CHARS:
            raise TemplateRefused(f"wrote more than {MAX_RENDERED_CHARS} characters")
        self._blocks.append(block)

    def generation(self, text: str) -> None:
        self._generations.append((self._length, plain(text)))

    def rendered(self) -> Rendered:
        """Raises TemplateRefused where a block was not written where it was rendered (a macro)."""
        text = "".join(self._blocks)
        for start, block in self._generations:
            if not text.startswith(block, start):
                raise TemplateRefused("a generation block stands in a macro and cannot be placed")
        return Rendered(text, tuple((at, at + len(block)) for at, block in self._generations))


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``, as transformers has it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_track", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _track(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        text = str(caller())
        tracker = context.get(_TRACKER)
        if isinstance(tracker, _Tracker):
            tracker.generation(text)
        return text


class _Namespace(jinja2.utils.Namespace):
    """Underscored names are refused, so that no template reaches into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Bare *args, so that a template may write namespace(self=...).
        self, given = args[0], args[1:]
        values = dict(*given, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    """``dict`` for templates, without the attributes of the real one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _prepared(
    kind: type[jinja2.sandbox.ImmutableSandboxedEnvironment],
    now: Callable[[], datetime.datetime],
) -> jinja2.Environment:
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateRefused(str(message))


def _literals(tree: jinja2.nodes.Template) -> Sequence[str]:
    data = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    constants = [node.value for node in tree.find_all(jinja2.nodes.Const)]
    return data + [value for value in constants if isinstance(value, str)]


def _as_seen(message: JsonObject) -> JsonObject:
    """A message as transformers hands it to a template; ``weight`` is ours alone."""
    seen = {key: value for key, value in message.items() if key != "weight"}
    if "reasoning_content" in seen:
        seen["thinking"] = seen["reasoning_content"]
    return seen
