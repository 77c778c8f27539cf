"""Storage in a folder: a local disk or an NFS mount.

A file or folder is written under a temporary name beside its place, every file is fsynced, the
manifest comes last, then the folder is fsynced, renamed into place, and its parent fsynced. A crash
at any point leaves either the whole artifact or a ``.tmp-`` folder nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llamahome.errors import NotFound, Unavailable
from llamahome.schemas import MANIFEST_NAME, ArtifactRef, JsonObject, Manifest, ManifestEntry
from llamahome.storage import manifest as manifests
from llamahome.storage.exchange import exchange
from llamahome.storage.paths import checked_path

TEMPORARY_PREFIX = ".tmp-"
# Another file system, one without links, too many of them, or a file that is not ours to link.
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
)
# What is there already: a folder that is not empty, or a file.
_IN_THE_WAY = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.ENOENT})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class LocalStorage:
    """:class:`~llamahome.storage.protocol.Storage` in a folder, which is made when missing."""

    def __init__(self, root: Path) -> None:
        with _storage_errors(str(root)):
            root.mkdir(parents=True, exist_ok=True)
        self.root = Path(os.path.realpath(root))

    def open(self, path: str) -> BinaryIO:
        with _storage_errors(path):
            return manifests.open_regular(self._real(path))

    def put(self, path: str, source: BinaryIO) -> tuple[int, str]:
        final = self._real(path)
        temporary = self._temporary(final)
        try:
            with _storage_errors(path):
                final.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as target:
                    found = manifests.copy_hashed(source, target)
                    _flush(target)
                if not _is_file_of(final, found):
                    temporary.chmod(0o444)
                    temporary.replace(final)
                self._sync_upwards(final.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return found

    def exists(self, path: str) -> bool:
        place = self._real(path)
        with _storage_errors(path):
            return place.is_file() or (place / MANIFEST_NAME).is_file()

    def size(self, path: str) -> int:
        with _storage_errors(path):
            return self._real(path).stat().st_size

    def publish(
        self,
        folder: Path,
        path: str,
        *,
        kind: str,
        facts: JsonObject | None = None,
        adopt: bool = False,
    ) -> ArtifactRef:
        final = self._real(path)
        temporary = self._temporary(final)
        try:
            with _storage_errors(path):
                entries = self._write(folder, temporary, adopt=adopt)
                manifest = _seal(temporary, kind, entries, facts)
                self._move_into_place(temporary, final, path, manifest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return manifests.artifact_ref(manifest, path)

    def fetch(
        self, artifact: ArtifactRef, into: Path, *, only: Collection[str] | None = None
    ) -> Path:
        """The storage's own folder, after every file was verified; ``into`` is not used."""
        final = self._real(artifact.path)
        with _storage_errors(artifact.path):
            raw = self._read_manifest(artifact.path)
            if raw is None:
                raise manifests.damaged("is not there", artifact.path)
            manifest = manifests.agreed_manifest(raw, artifact)
            self._verify(manifests.entries_of(manifest, only, artifact.path), artifact.path)
        return final

    def manifest(self, path: str) -> Manifest:
        with _storage_errors(path):
            raw = self._read_manifest(path)
        if raw is None:
            raise NotFound("not in the storage", file=path)
        return manifests.parse_manifest(raw, path)

    def delete(self, path: str) -> None:
        place = self._real(path)
        with _storage_errors(path), contextlib.suppress(FileNotFoundError):
            if place.is_dir():
                # Out of sight first, so that nobody meets a half-deleted artifact.
                trash = self._temporary(place)
                place.rename(trash)
                shutil.rmtree(trash)
            else:
                place.unlink()

    def _real(self, path: str) -> Path:
        place = self.root / checked_path(path)
        if os.path.realpath(place) != str(place):
            raise ValueError(f"{path!r} leads through a symlink")
        return place

    def _temporary(self, final: Path) -> Path:
        return final.with_name(f"{TEMPORARY_PREFIX}{final.name[:100]}-{uuid.uuid4().hex}")

    def _write(self, folder: Path, temporary: Path, *, adopt: bool) -> list[ManifestEntry]:
        """Every file of ``folder`` in ``temporary``, hashed, read-only and fsynced."""
        temporary.mkdir(parents=True)
        entries = []
        for name in manifests.files_below(folder):
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if adopt and _linked(folder / name, target):
                with manifests.open_regular(target) as file:
                    size, sha256 = manifests.hash_stream(file)
                    os.fsync(file.fileno())
            else:
                with manifests.open_regular(folder / name) as source, target.open("xb") as copy:
                    size, sha256 = manifests.copy_hashed(source, copy)
                    _flush(copy)
            target.chmod(0o444)
            entries.append(ManifestEntry(name=name, bytes=size, sha256=sha256))
        return entries

    def _move_into_place(self, temporary: Path, final: Path, path: str, manifest: Manifest) -> None:
        try:
            temporary.rename(final)
        except OSError as error:
            # Something is there, or NFS reports a rename that did happen.
            if error.errno not in _IN_THE_WAY:
                raise
            if not self._keeps(final, path, manifest):
                self._replace(temporary, final, path)
        self._sync_upwards(final.parent)

    def _keeps(self, final: Path, path: str, wanted: Manifest) -> bool:
        """Whether it is there already, every byte. Raises CorruptArtifact, and ValueError where
        what is there must not be replaced."""
        raw = self._read_manifest(path)
        if raw is None:
            if any(final.rglob(MANIFEST_NAME)):
                raise ValueError(f"{path!r} holds artifacts of its own and can become none")
            return False
        return manifests.keeps(raw, wanted, path, lambda found: self._verify(found.files, path))

    def _replace(self, temporary: Path, final: Path, path: str) -> None:
        """Who reads what is there meanwhile finds one or the other, file by file; where two folders
        cannot be exchanged, nothing for a moment."""
        if final.is_dir() and exchange(temporary, final):
            return
        self.delete(path)
        temporary.rename(final)

    def _verify(self, entries: Iterable[ManifestEntry], path: str) -> None:
        """Raises DamagedArtifact."""
        for entry in entries:
            try:
                with manifests.open_regular(self._real(f"{path}/{entry.name}")) as file:
                    found = manifests.hash_stream(file)
            except (FileNotFoundError, NotADirectoryError, ValueError) as error:
                raise manifests.damaged(
                    f"{entry.name} is in the manifest, but not there ({error})", path
                ) from None
            manifests.check_entry(entry, found, path)

    def _read_manifest(self, path: str) -> bytes | None:
        """None where there is none."""
        try:
            with manifests.open_regular(self._real(path) / MANIFEST_NAME) as source:
                return source.read(manifests.MAX_MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _sync_upwards(self, folder: Path) -> None:
        """fsync ``folder`` and those above it up to the root: new ones must survive as well."""
        while folder != self.root:
            _sync_folder(folder)
            folder = folder.parent
        _sync_folder(self.root)


def _seal(
    folder: Path, kind: str, entries: Sequence[ManifestEntry], facts: JsonObject | None
) -> Manifest:
    """Write the manifest, last of all, and fsync the folders."""
    manifest = manifests.build_manifest(kind, entries, facts)
    with (folder / MANIFEST_NAME).open("xb") as out:
        out.write(manifests.manifest_bytes(manifest))
        _flush(out)
    (folder / MANIFEST_NAME).chmod(0o444)
    for below, _, _ in os.walk(folder):
        _sync_folder(Path(below))
    return manifest


def _linked(source: Path, target: Path) -> bool:
    """Whether ``target`` now is ``source``'s file; not where the file system cannot do that."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_file_of(place: Path, wanted: tuple[int, str]) -> bool:
    """Whether a file of that size and digest is there."""
    if not place.is_file() or place.stat().st_size != wanted[0]:
        return False
    with place.open("rb") as file:
        return manifests.hash_stream(file) == wanted


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """OSErrors of the storage as the tree's own."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound("not in the storage", file=path) from None
    except OSError as error:
        full = error.errno in _FULL
        raise Unavailable(
            f"the storage answered: {error.strerror or error}",
            code="storage_full" if full else "unavailable",
            file=path,
            remedy="Free space there and try again" if full else "See that it is mounted, writable",
        ) from error
