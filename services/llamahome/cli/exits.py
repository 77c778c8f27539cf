"""What the command says and returns when something is wrong.

==== =========================================================================
code meaning
==== =========================================================================
0    done
1    for the user to fix (UserError, a file that cannot be read), or a failed job
2    wrong usage, or an extra that is not installed
3    something does not answer or is full; try again (TransientError)
4    ours (OperatorError, and anything unexpected)
130  Ctrl-C
==== =========================================================================

`train` ends with 2 for everything given that cannot be used, and with 1 for a full disk.
Every error is one line on stderr: ``error: place: message. remedy``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
import traceback

import typer

from llamahome.errors import InvalidConfig, LlamaHomeError, OperatorError, TransientError

USER, USAGE, UNAVAILABLE, OPERATOR, INTERRUPTED = 1, 2, 3, 4, 130

# Which modules prove that an extra is installed.
_EXTRAS: dict[str, tuple[str, ...]] = {
    "fleet": (
        "alembic", "celery", "fsspec", "jinja2", "msgspec", "numpy", "prometheus_client", "psutil",
        "pydantic_settings", "redis", "rich", "safetensors", "sqlalchemy", "structlog",
        "tokenizers", "typer", "yaml",
    ),
    "gateway": ("fastapi", "python_multipart", "uvicorn"),
    "training": ("torch", "transformers", "peft"),
}  # fmt: skip


class MissingExtra(InvalidConfig):
    """The command is there, but not what it runs on. Exit code 2."""

    default_code = "missing_extra"


class EndedWith(Exception):
    """An error whose exit code the command itself decides."""

    def __init__(self, error: Exception, code: int) -> None:
        super().__init__(str(error))
        self.error, self.code = error, code


def missing_modules(extra: str) -> list[str]:
    """The modules of ``extra`` that cannot be found; none of them is imported."""
    return [name for name in _EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require(extra: str) -> None:
    """Raise MissingExtra naming what to install, unless ``extra`` is there."""
    missing = missing_modules(extra)
    if missing:
        raise _missing_extra(extra, missing)


def exit_code(error: BaseException) -> int:
    """The exit code of an error that ended a command."""
    if isinstance(error, EndedWith):
        return error.code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED
    if isinstance(error, MissingExtra) or _is_usage(error):
        return USAGE
    if isinstance(error, (TransientError, ConnectionError, TimeoutError)):
        return UNAVAILABLE
    if isinstance(error, OperatorError):
        return OPERATOR
    return USER if isinstance(error, (LlamaHomeError, OSError)) else OPERATOR


def report(error: BaseException, *, debug: bool, stderr_is_log: bool = False) -> int:
    """Show ``error`` as one line on stderr and return the exit code.

    The traceback of an unexpected one goes to a file; with ``debug`` every error's goes to stderr,
    with ``stderr_is_log`` (a process of a fleet) an unexpected one's does.
    """
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name)):
        error = _missing_extra(extra, [str(error.name)])
    code = exit_code(error)
    if isinstance(error, EndedWith):
        error = error.error
    if code == INTERRUPTED:
        return code
    shown = debug or (stderr_is_log and not _is_expected(error))
    if shown:
        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {one_line(_text(error, traceback_shown=shown))}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """``text`` without line breaks or control characters, which could hide what follows them."""
    line = " ".join(part.strip() for part in text.splitlines())
    return "".join(char if char.isprintable() else "?" for char in line)


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (LlamaHomeError, OSError)) or _is_usage(error)


def _text(error: BaseException, *, traceback_shown: bool) -> str:
    if isinstance(error, LlamaHomeError):
        return str(error)
    if _is_usage(error):
        return f"{error.format_message()} Try --help"  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = f"unexpected {type(error).__name__}: {error}"
    return text if traceback_shown else f"{text}. {_save_traceback(error)}"


def _is_usage(error: BaseException) -> bool:
    # Typer brings its own copy of click in some versions and uses click itself in others, so the
    # class cannot be named; only its own exceptions have this method.
    return hasattr(error, "format_message")


def _extra_of(module: str | None) -> str | None:
    top = (module or "").partition(".")[0]
    return next((extra for extra, modules in _EXTRAS.items() if top in modules), None)


def _missing_extra(extra: str, missing: list[str]) -> MissingExtra:
    return MissingExtra(
        f"this command needs {', '.join(missing)}",
        remedy=f"Install the {extra} extra: pip install 'llamahome[{extra}]'",
    )


def _save_traceback(error: BaseException) -> str:
    """Put the traceback into a file of its own and say where."""
    name = f"llamahome-error-{time.strftime('%Y%m%d-%H%M%S')}-"
    try:
        handle, path = tempfile.mkstemp(prefix=name, suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    except OSError as full:
        return f"Its details could not be saved ({full.strerror}); --debug shows them"
    return f"The details are in {path}"
