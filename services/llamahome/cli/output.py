"""How the command prints: data on stdout, everything said along the way on stderr.

On a terminal tables are drawn by rich; off one they are plain columns without ANSI, one row a
line. ``--json`` prints one JSON value on one line.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "-"


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr.

    A terminal that is gone must not end what is going on, least of all an orderly end.
    """
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def put(text: str) -> None:
    """A line of the answer, on stdout."""
    print(text, flush=True)


def put_json(value: Any) -> None:
    """One JSON value on one line of stdout; pydantic models are written by their own rules."""
    put(json.dumps(plain(value)))


def plain(value: Any) -> Any:
    """``value`` as JSON types."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def put_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, stream: TextIO | None = None
) -> None:
    """A table with a header line."""
    out = stream or sys.stdout
    cells = [list(row) for row in rows]
    if out.isatty():
        from rich.console import Console

        Console(file=out).print(rich_table(columns, cells))
        return
    for line in plain_table(columns, cells):
        print(line, file=out)
    out.flush()


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by spaces, two between them."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, not str: a job's suffix or an error could otherwise be read as rich's markup.
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    return table


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """``name  value`` lines, aligned; a value of several lines keeps its column."""
    shown = [(name, value) for name, value in pairs]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        first, *more = value.splitlines() or [""]
        put(f"{name.ljust(width)}  {first}".rstrip())
        for line in more:
            put(f"{' ' * width}  {line}".rstrip())


def duration(seconds: float | None) -> str:
    """0.42 s, 12 s, 3 m 05 s, 2 h 07 m, 3 d 04 h."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{max(seconds, 0.0):.2g} s" if seconds >= 0.005 else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(num_bytes: int | float) -> str:
    """Bytes with a binary unit: 812 B, 1.5 KiB, 3.2 GiB."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def number(value: Any, digits: int = 4) -> str:
    """A measured number with ``digits`` significant ones; missing and non-finite are ``-``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def share(done: float | None, total: float | None) -> str:
    """``42 %``, or ``-`` while the total is not known."""
    return f"{100 * done / total:.0f} %" if done is not None and total else MISSING


_STYLES = {
    "succeeded": "green", "done": "green", "ok": "green",
    "failed": "red", "parked": "red", "lost": "red", "fail": "red",
    "running": "cyan", "warn": "yellow", "paused": "yellow", "retried": "yellow",
}  # fmt: skip


def _style(cell: str) -> str:
    return _STYLES.get(cell, "")
