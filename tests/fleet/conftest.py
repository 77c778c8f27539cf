"""One fleet for all tests of this folder: starting it costs seconds, sharing it is also a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from support.fleet import Fleet, running_fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They share one fleet, so they run in one process, whatever -n says."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.fleet)
            item.add_marker(pytest.mark.model)
            item.add_marker(pytest.mark.xdist_group("fleet"))
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that submissions may name by URI, with 120 of the shipped conversations."""
    folder = tmp_path_factory.mktemp("data")
    sample = resources.files("llamahome.conversations") / "samples" / "support.jsonl"
    lines = sample.read_text(encoding="utf-8").splitlines()[:120]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert all(json.loads(line) for line in lines)
    return folder


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("state")
    with running_fleet(state, LLAMAHOME_URI_ALLOWLIST=f"file://{data}/") as started:
        yield started
