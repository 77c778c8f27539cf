"""Every room is type-checked and guarded by the import contracts."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_room_is_type_checked() -> None:
    """Of a namespace package in two roots mypy finds the first root alone, so rooms are listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    rooms = {
        f"llamahome.{folder.parent.name}"
        for root in ("shared", "services")
        for folder in (ROOT / root / "llamahome").glob("*/__init__.py")
    }

    assert set(listed) == rooms
