"""The digest of a base model's folder: registered with its name, checked when it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path


def base_digest(folder: Path) -> str:
    """sha256 (hex) over the sorted (name below ``folder``, sha256) of its files.

    Hidden files and folders do not count: downloaders keep their caches there.
    """
    whole = hashlib.sha256()
    for path in base_files(folder):
        name = path.relative_to(folder).as_posix()
        whole.update(f"{_file_digest(path)}  {name}\n".encode())
    return whole.hexdigest()


def base_files(folder: Path) -> list[Path]:
    """Every file that counts, sorted by name; links to files are followed, to folders not."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
