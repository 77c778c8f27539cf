"""Folder -> manifest -> digest, and the checks that go the other way."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from llamahome.errors import CorruptArtifact, DamagedArtifact
from llamahome.schemas import MANIFEST_NAME, ArtifactRef, JsonObject, Manifest, ManifestEntry
from llamahome.storage.paths import checked_path

CHUNK_BYTES = 1024 * 1024
MAX_MANIFEST_BYTES = 64 * 1024 * 1024


def copy_hashed(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy to the end. Returns (bytes, sha256 hex). Raises OSError."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def hash_stream(source: BinaryIO) -> tuple[int, str]:
    """(bytes, sha256 hex) of the rest of the stream. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A symlink at its end is refused with OSError (ELOOP)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def files_below(folder: Path) -> list[str]:
    """Names of all files below ``folder``, sorted, '/'-separated; an old manifest is left out.

    Raises ValueError for a symlink, a device or a name that is no storage path: an artifact holds
    regular files only.
    """
    names = sorted(name for name in _walk(folder, "") if name != MANIFEST_NAME)
    for name in names:
        checked_path(name)
    return names


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise ValueError(f"{name} is neither a regular file nor a folder")


def manifest_of(folder: Path, kind: str, facts: JsonObject | None) -> Manifest:
    """Hash every file below ``folder``. Raises OSError and ValueError."""
    entries = []
    for name in files_below(folder):
        with open_regular(folder / name) as source:
            size, sha256 = hash_stream(source)
        entries.append(ManifestEntry(name=name, bytes=size, sha256=sha256))
    return build_manifest(kind, entries, facts)


def build_manifest(
    kind: str, entries: Sequence[ManifestEntry], facts: JsonObject | None
) -> Manifest:
    ordered = tuple(sorted(entries, key=lambda entry: entry.name))
    return Manifest(kind=kind, files=ordered, facts=facts or {})


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is stored: equal manifests give equal bytes."""
    text = json.dumps(
        manifest.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, allow_nan=False,
        separators=(",", ":"),
    )  # fmt: skip
    return text.encode() + b"\n"


def artifact_ref(manifest: Manifest, path: str) -> ArtifactRef:
    digest = hashlib.sha256(manifest_bytes(manifest)).hexdigest()
    return ArtifactRef(digest=digest, path=path, bytes=manifest.total_bytes)


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Raises DamagedArtifact where the bytes are no manifest."""
    try:
        manifest = Manifest.model_validate_json(raw)
        for entry in manifest.files:
            checked_path(entry.name)
    except (ValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise damaged(f"unreadable manifest: {reason}", path) from None
    return manifest


def agreed_manifest(raw: bytes, artifact: ArtifactRef) -> Manifest:
    """The manifest, once its digest is the one the ledger knows. Raises DamagedArtifact."""
    digest = hashlib.sha256(raw).hexdigest()
    if digest != artifact.digest:
        raise damaged(
            f"manifest digest is {digest[:12]}, expected {artifact.digest[:12]}", artifact.path
        )
    return parse_manifest(raw, artifact.path)


def entries_of(
    manifest: Manifest, only: Collection[str] | None, path: str
) -> tuple[ManifestEntry, ...]:
    """Those of the files named in ``only``, None for all. Raises CorruptArtifact where one is none
    of the artifact's.
    """
    if only is None:
        return manifest.files
    found = tuple(entry for entry in manifest.files if entry.name in only)
    if missing := sorted(set(only) - {entry.name for entry in found}):
        raise CorruptArtifact("not in the manifest", file=f"{path}/{missing[0]}")
    return found


def check_entry(entry: ManifestEntry, found: tuple[int, str], path: str) -> None:
    """Raises DamagedArtifact where size or sha256 differ from the manifest."""
    size, sha256 = found
    if size != entry.bytes:
        raise damaged(f"{entry.name}: {size} bytes, the manifest says {entry.bytes}", path)
    if sha256 != entry.sha256:
        raise damaged(
            f"{entry.name}: sha256 is {sha256[:12]}, the manifest says {entry.sha256[:12]}", path
        )


def keeps(raw: bytes, wanted: Manifest, path: str, verify: Callable[[Manifest], None]) -> bool:
    """Whether the artifact whose manifest is ``raw`` is ``wanted``, whole; not where it is damaged.

    ``verify`` raises DamagedArtifact. Raises CorruptArtifact where a whole one of other files is
    there.
    """
    try:
        found = parse_manifest(raw, path)
        verify(found)
    except DamagedArtifact:
        return False
    if found.files != wanted.files:
        given, kept = artifact_ref(wanted, path).digest, artifact_ref(found, path).digest
        raise CorruptArtifact(
            f"already published with manifest {kept[:12]}, not {given[:12]}", file=path,
            remedy="One key gave two outputs: keep both and report it",
        )  # fmt: skip
    return raw == manifest_bytes(wanted)


def damaged(what: str, path: str) -> DamagedArtifact:
    return DamagedArtifact(
        what, file=path, remedy="Nobody writes there once it is published: see to that disk"
    )
