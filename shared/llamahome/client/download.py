"""A published folder, downloaded whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import urllib.parse
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from llamahome.client.http import Http
from llamahome.client.objects import ArtifactInfo
from llamahome.errors import CorruptArtifact, InvalidState


def fetch_folder(http: Http, job_path: str, files: Iterable[ArtifactInfo], into: Path) -> Path:
    """Write ``files`` to a folder beside ``into``, then rename it. Returns ``into``.

    Raises InvalidState when ``into`` holds anything, CorruptArtifact when a file's bytes are not
    those that were published, Unavailable when the gateway stops answering.
    """
    _refuse_occupied(into)
    into.parent.mkdir(parents=True, exist_ok=True)
    # A hidden sibling: on the same file system, so that the rename is atomic.
    part = into.parent / f".{into.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        for file in files:
            target = part / _safe(file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_file(http, job_path, file, target)
        _refuse_occupied(into)
        part.rename(into)  # replaces an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)  # gone already when the rename succeeded
    return into


def _refuse_occupied(into: Path) -> None:
    if into.is_dir() and not any(into.iterdir()):
        return
    if into.exists() or into.is_symlink():
        kind = "is not empty" if into.is_dir() else "is not a folder"
        raise InvalidState(
            kind, code="folder_not_empty", file=str(into),
            remedy="Name a new folder, or empty this one",
        )  # fmt: skip


def _safe(name: str) -> PurePosixPath:
    # The gateway is trusted with keys, but not with this machine's other folders.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise CorruptArtifact(f"the gateway names a file {name!r}, which is outside the adapter")
    return path


def _fetch_file(http: Http, job_path: str, file: ArtifactInfo, target: Path) -> None:
    url = f"{job_path}/artifacts/{urllib.parse.quote(file.name)}"

    def attempt(_: int) -> str:
        digest = hashlib.sha256()
        with http.stream(url) as response, target.open("wb") as out:
            for chunk in response.iter_bytes():
                digest.update(chunk)
                out.write(chunk)
        return digest.hexdigest()

    found = http.retrying(attempt)
    if found != file.sha256:
        raise CorruptArtifact(
            f"{file.name} has sha256 {found}, but {file.sha256} was published",
            remedy="Fetch it again; if it stays so, tell the operator",
        )
