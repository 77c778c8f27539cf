"""Bases for the tests of this room, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.bases import write_base


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_base("chatml", "byte_level")`` -> the folder of such a base (None: no template)."""
    made: dict[tuple[str | None, str], Path] = {}

    def make(template: str | None, family: str = "byte_level") -> Path:
        if (template, family) not in made:
            folder = tmp_path_factory.mktemp("base")
            made[template, family] = write_base(folder, template, family)
        return made[template, family]

    return make
