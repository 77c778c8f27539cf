"""Disks that behave as tests want them to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.local import tree


def separate_file_system(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Make ``root`` as good as one: nothing can be renamed or linked into it or out of it."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def move(a: Any, b: Any, **more: Any) -> Any:
            if Path(a).is_relative_to(root) != Path(b).is_relative_to(root):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return real(a, b, **more)

        return move

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(tree, "exchange", refusing(tree.exchange))
