"""Every point has a test, and the page that says so is up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# The eight areas of tests that SPEC.md names, and points of each.
AREAS = {
    "sample loading": (26, 28), "validation splitting": (56, 57), "tokenization": (47, 54),
    "batch processing": (61, 62), "configuration loading": (13, 19), "progress tracking": (64, 72),
    "early stopping": (71,), "metric saving": (75,),
}  # fmt: skip


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spec_coverage", ROOT / "docs/spec_coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date_and_every_point_has_a_test(
    coverage: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    status = coverage.main(["--check"])
    assert (status, capsys.readouterr().err) == (0, "")


def test_a_point_without_a_test_and_a_test_without_a_point_are_told(
    coverage: ModuleType, tmp_path: Path
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text(
        'def test_one():\n    """BEHAVIOUR 1, 4: both."""\n'
        'async def test_two():\n    """BEHAVIOUR 2: it.\n\n    More."""\n'
        'def test_three():\n    """About BEHAVIOUR 3: no mark."""\n'
        'def helper():\n    """BEHAVIOUR 3: no test."""\n'
    )
    found: dict[int, list[str]] = {}
    for number, name in coverage.marks(tests):
        found.setdefault(number, []).append(name)
    assert found == {
        1: ["tests/test_a.py::test_one"], 4: ["tests/test_a.py::test_one"],
        2: ["tests/test_a.py::test_two"],
    }  # fmt: skip
    points = [("Area", "First"), ("Area", "Second"), ("Other", "Third")]
    assert coverage.problems(points, found) == [
        "point 3 has no test: Third", "tests/test_a.py::test_one: there is no point 4",
    ]  # fmt: skip
    page = coverage.page(points, {**found, 3: ["tests/x.py::test_x"]})
    assert "| 2 | Second | `test_a.py::test_two` |" in page
    assert page.index("## Area") < page.index("| 1 |") < page.index("## Other")


def test_each_area_of_tests_that_spec_names_has_its_tests(
    coverage: ModuleType, pytestconfig: pytest.Config
) -> None:
    """BEHAVIOUR 79: the eight areas, most of them in tests/spec, run by pytest-asyncio with a tiny
    model that the tests make themselves."""
    held = [number for number, name in coverage.marks(ROOT / "tests") if "/spec/" in name]
    for area, points in AREAS.items():
        assert set(points) & set(held), area
    assert len(coverage.read_points()) == 80
    assert pytestconfig.pluginmanager.hasplugin("asyncio")
