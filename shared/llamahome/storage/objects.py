"""Storage in an object store, through fsspec: S3 and its like, and ``memory://``.

There is no rename: data objects first, the manifest last, and one PUT is atomic. Nothing is written
through ``fs.open(path, "wb")``, which commits a truncated object when its block raises.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llamahome.errors import CorruptArtifact, NotFound, Unavailable
from llamahome.schemas import MANIFEST_NAME, ArtifactRef, JsonObject, Manifest
from llamahome.storage import manifest as manifests
from llamahome.storage.paths import checked_path


class ObjectStorage:
    """:class:`~llamahome.storage.protocol.Storage` over an fsspec file system below ``root``."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")

    def open(self, path: str) -> BinaryIO:
        with _storage_errors(path):
            return cast(BinaryIO, self._fs.open(self._key(path), "rb"))

    def put(self, path: str, source: BinaryIO) -> tuple[int, str]:
        with tempfile.NamedTemporaryFile(prefix="llamahome-put-") as local, _storage_errors(path):
            found = manifests.copy_hashed(source, cast(BinaryIO, local))
            local.flush()
            if not self._is_there(path, *found):
                self._put_file(local.name, path, found[0])
        return found

    def exists(self, path: str) -> bool:
        with _storage_errors(path):
            self._fs.invalidate_cache()
            key = self._key(path)
            return bool(self._fs.isfile(key) or self._fs.isfile(f"{key}/{MANIFEST_NAME}"))

    def size(self, path: str) -> int:
        with _storage_errors(path):
            self._fs.invalidate_cache()
            return int(self._fs.info(self._key(path))["size"])

    def publish(
        self,
        folder: Path,
        path: str,
        *,
        kind: str,
        facts: JsonObject | None = None,
        adopt: bool = False,
    ) -> ArtifactRef:
        """An object store always copies: ``adopt`` changes nothing."""
        with _storage_errors(path):
            manifest = manifests.manifest_of(folder, kind, facts)
            if self._published(path) is not None or not self._put_new(folder, manifest, path):
                self._keep_or_mend(folder, manifest, path)
        return manifests.artifact_ref(manifest, path)

    def fetch(
        self, artifact: ArtifactRef, into: Path, *, only: Collection[str] | None = None
    ) -> Path:
        """``into`` with the verified files; removed again when one does not agree."""
        raw = self._published(artifact.path)
        if raw is None:
            raise manifests.damaged("is not there", artifact.path)
        manifest = manifests.agreed_manifest(raw, artifact)
        try:
            for entry in manifests.entries_of(manifest, only, artifact.path):
                self._fetch_file(artifact.path, entry.name, into / entry.name)
                with manifests.open_regular(into / entry.name) as source:
                    manifests.check_entry(entry, manifests.hash_stream(source), artifact.path)
        except BaseException:
            shutil.rmtree(into, ignore_errors=True)
            raise
        return into

    def manifest(self, path: str) -> Manifest:
        raw = self._published(path)
        if raw is None:
            raise NotFound("not in the storage", file=path)
        return manifests.parse_manifest(raw, path)

    def delete(self, path: str) -> None:
        """The manifest goes first: what is left is then no artifact."""
        key = self._key(path)
        with _storage_errors(path):
            self._fs.invalidate_cache()
            for name in (f"{key}/{MANIFEST_NAME}", key):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(name, recursive=name == key)

    def _key(self, path: str) -> str:
        return f"{self._root}/{checked_path(path)}"

    def _published(self, path: str) -> bytes | None:
        """The manifest's bytes, None where there is no artifact."""
        with _storage_errors(path):
            self._fs.invalidate_cache()
            try:
                return bytes(self._fs.cat_file(f"{self._key(path)}/{MANIFEST_NAME}"))
            except FileNotFoundError:
                return None

    def _put_file(self, local: str, path: str, size: int) -> None:
        """Upload, and take it back where the store kept another number of bytes."""
        self._fs.put_file(local, self._key(path))
        try:
            self._check_size(path, size)
        except CorruptArtifact:
            self._fs.rm_file(self._key(path))
            raise

    def _put_new(self, folder: Path, manifest: Manifest, path: str) -> bool:
        """Whether the manifest that is there now is this one: another attempt may win."""
        for entry in manifest.files:
            self._put_file(str(folder / entry.name), f"{path}/{entry.name}", entry.bytes)
        raw = manifests.manifest_bytes(manifest)
        try:
            # "create" is If-None-Match: * on S3.
            self._fs.pipe_file(f"{self._key(path)}/{MANIFEST_NAME}", raw, mode="create")
        except FileExistsError:
            return False
        return True

    def _keep_or_mend(self, folder: Path, manifest: Manifest, path: str) -> None:
        """Put again what is damaged, the manifest last. Raises CorruptArtifact."""

        def verify(found: Manifest) -> None:
            for entry in found.files:
                if not self._is_there(f"{path}/{entry.name}", entry.bytes, entry.sha256):
                    raise manifests.damaged(f"{entry.name} is missing or changed", path)

        if manifests.keeps(self._published(path) or b"", manifest, path, verify):
            return
        for entry in manifest.files:
            name = f"{path}/{entry.name}"
            if not self._is_there(name, entry.bytes, entry.sha256):
                self._put_file(str(folder / entry.name), name, entry.bytes)
        raw = manifests.manifest_bytes(manifest)
        self._fs.pipe_file(f"{self._key(path)}/{MANIFEST_NAME}", raw)

    def _is_there(self, path: str, size: int, sha256: str) -> bool:
        """Whether an object of these bytes is; it is read only where its size agrees."""
        try:
            if self.size(path) != size:
                return False
        except NotFound:
            return False
        with self.open(path) as source:
            return manifests.hash_stream(source) == (size, sha256)

    def _fetch_file(self, path: str, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _storage_errors(path):
                self._fs.get_file(self._key(f"{path}/{name}"), str(target))
        except NotFound:
            raise manifests.damaged(f"{name} is in the manifest, but not there", path) from None

    def _check_size(self, path: str, wanted: int) -> None:
        found = self.size(path)
        if found != wanted:
            raise CorruptArtifact(f"{found} bytes are stored, {wanted} were given", file=path)


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """OSErrors of the object store as the tree's own."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound("not in the storage", file=path) from None
    except OSError as error:
        raise Unavailable(
            f"the object store answered: {error}", file=path,
            remedy="See that it is reachable and that the credentials may write there",
        ) from error  # fmt: skip
