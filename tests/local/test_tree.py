"""A folder that takes the place of another one."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from llamahome.local import tree
from llamahome.local.tree import replace_folder
from support.disks import separate_file_system


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its name below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_takes_the_place_of_another_one_on_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 74, 12: by a copy that is whole before it is seen; nothing is left of one that
    breaks off."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    separate_file_system(monkeypatch, there)
    for content in ("first", "second"):
        new = write_folder(here / "new", content)
        replace_folder(new, there / "place")
        assert contents(there) == {"place/below/file": content.encode()}
        assert not new.exists()
    monkeypatch.setattr(tree, "exchange", lambda a, b: False)
    replace_folder(write_folder(here / "new", "third"), there / "place")
    assert contents(there) == {"place/below/file": b"third"}

    def full(*values: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    new = write_folder(here / "new", "fourth")
    with pytest.raises(OSError, match="No space left") as caught:
        replace_folder(new, there / "place")
    assert caught.value.errno == errno.ENOSPC
    assert contents(there) == {"place/below/file": b"third"}
    assert contents(new) == {"below/file": b"fourth"}
    assert [path.name for path in there.iterdir()] == ["place"]


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    """BEHAVIOUR 74, 12: models may lie on a larger disk."""
    write_folder(tmp_path / "large" / "model", "old")
    (tmp_path / "place").symlink_to(tmp_path / "large" / "model")
    replace_folder(write_folder(tmp_path / "new", "new"), tmp_path / "place")
    assert (tmp_path / "place").is_symlink()
    assert contents(tmp_path / "large") == {"model/below/file": b"new"}


def write_folder(folder: Path, content: str) -> Path:
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").write_text(content)
    return folder
