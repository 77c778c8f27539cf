"""The validation report as a page a person can read: Markdown, so it needs nothing to open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llamahome.schemas import ValidationReport

_REASON_CHARS = 200


def report_page(report: ValidationReport) -> str:
    """The report's numbers and first bad rows; rows = valid + invalid in every line of it."""
    bad = sum(report.invalid.values())
    parts = [
        "# Validation",
        f"{report.total} rows = {report.valid} valid + {bad} invalid. {report.duplicates} of the "
        f"valid rows have an equal one before them; {report.leaked} validation rows also stand in "
        "the training files.",
        "## Files",
        _files(report),
    ]
    if report.invalid:
        parts += ["## Why rows cannot be used", _reasons(report)]
    if report.examples:
        shown = len(report.examples)
        parts += [f"## The first {shown} of them" if shown < bad else "## Where", _examples(report)]
    return "\n\n".join(parts) + "\n"


def _files(report: ValidationReport) -> str:
    rows = [
        (_code(f.file), f.format or "", f.container or "", f.total, f.valid,
         sum(f.invalid.values()), f.blank)
        for f in report.files
    ]  # fmt: skip
    bad = sum(report.invalid.values())
    blank = sum(counts.blank for counts in report.files)
    total = ("all", "", "", report.total, report.valid, bad, blank)
    head = ("file", "format", "container", "rows", "valid", "invalid", "blank lines")
    return _table(head, [*rows, total])


def _reasons(report: ValidationReport) -> str:
    ordered = sorted(report.invalid.items(), key=lambda item: (-item[1], item[0]))
    total = ("all", sum(report.invalid.values()))
    return _table(("code", "rows"), [*((_code(code), rows) for code, rows in ordered), total])


def _examples(report: ValidationReport) -> str:
    rows = [(_code(e.file), e.line, _code(e.code), _code(e.reason)) for e in report.examples]
    return _table(("file", "line", "code", "reason"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    """Text from outside, shown as it is: it may hold whatever Markdown would act on."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    shown = shown[:_REASON_CHARS].replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
