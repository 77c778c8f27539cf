"""Writes docs/spec_coverage.md: which tests hold each point of SPEC.md.

A test holds the points that the first line of its docstring names: ``BEHAVIOUR 17: ...`` or
``BEHAVIOUR 16, 17: ...``. With ``--check`` nothing is written; the exit status is 1 where the page
is not up to date. A point without a test, or a number that is no point, is always an error.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
POINTS = ROOT / "docs" / "spec_points.txt"
PAGE = ROOT / "docs" / "spec_coverage.md"
_MARK = re.compile(r"BEHAVIOUR (\d+(?:, \d+)*): \S")
HEAD = """# Which tests hold SPEC.md

SPEC.md, read strictly, is {points} points; this page lists the tests that hold each. It is written by
`make spec-coverage` from the first lines of the tests' docstrings; do not edit it.
"""  # noqa: E501


def read_points(path: Path = POINTS) -> list[tuple[str, str]]:
    """(area, title) of each point, in order."""
    points, area = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            area = line.removeprefix("== ")
        elif line and not line.startswith("#"):
            points.append((area, line))
    return points


def marks(tests: Path) -> Iterator[tuple[int, str]]:
    """(point, test as ``path::name``) of each mark, in the order of the files."""
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            found = _MARK.match(ast.get_docstring(node) or "")
            if found and node.name.startswith("test_"):
                name = f"{path.relative_to(tests.parent).as_posix()}::{node.name}"
                yield from ((int(number), name) for number in found[1].split(", "))


def page(points: Sequence[tuple[str, str]], found: Mapping[int, Sequence[str]]) -> str:
    text, area = HEAD.format(points=len(points)), ""
    for number, (of_area, title) in enumerate(points, 1):
        if of_area != area:
            area = of_area
            text += f"\n## {area}\n\n| point | what | tests |\n| --- | --- | --- |\n"
        tests = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in found[number])
        text += f"| {number} | {title} | {tests} |\n"
    return text


def problems(points: Sequence[tuple[str, str]], found: Mapping[int, Sequence[str]]) -> list[str]:
    numbers = range(1, len(points) + 1)
    missing = [f"point {n} has no test: {points[n - 1][1]}" for n in numbers if not found.get(n)]
    unknown = [
        f"{name}: there is no point {n}" for n in found if n not in numbers for name in found[n]
    ]
    return missing + unknown


def main(arguments: Sequence[str]) -> int:
    points, found = read_points(), defaultdict[int, list[str]](list)
    for number, name in marks(ROOT / "tests"):
        found[number].append(name)
    if wrong := problems(points, found):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    text = page(points, found)
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not up to date: run `make spec-coverage`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
