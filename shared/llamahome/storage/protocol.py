"""What a storage can do. Paths are relative, '/'-separated and below the storage root."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, Protocol

from llamahome.schemas import ArtifactRef, JsonObject, Manifest


class Storage(Protocol):
    """Immutable files and artifacts.

    An artifact is a folder whose manifest was written last: no manifest, no artifact. A path that
    is absolute, has '..' or NUL is a ValueError. Trouble with the disk or the service is
    Unavailable, with a remedy.
    """

    def open(self, path: str) -> BinaryIO:
        """A seekable stream, also of a file inside an artifact. Raises NotFound, Unavailable."""
        ...

    def put(self, path: str, source: BinaryIO) -> tuple[int, str]:
        """Store one file durably and return its (bytes, sha256 hex).

        One that is there is left as it is where it has the same bytes, and replaced where it has
        others: a path is for one content, and that is damage. Raises Unavailable, CorruptArtifact
        where the storage kept another number of bytes.
        """
        ...

    def exists(self, path: str) -> bool:
        """Whether a file, or an artifact with its manifest, is there."""
        ...

    def size(self, path: str) -> int:
        """Bytes of one file. Raises NotFound."""
        ...

    def publish(
        self,
        folder: Path,
        path: str,
        *,
        kind: str,
        facts: JsonObject | None = None,
        adopt: bool = False,
    ) -> ArtifactRef:
        """Make every file below ``folder`` durable at ``path``, the manifest last.

        ``adopt``: nobody writes to these files again, so the storage may keep them themselves
        rather than copies; they become read-only.
        What is there is verified first: an equal artifact is returned, one of other files raises
        CorruptArtifact, a damaged one and leftovers without a manifest are replaced. Symlinks are a
        ValueError. Raises Unavailable.
        """
        ...

    def fetch(
        self, artifact: ArtifactRef, into: Path, *, only: Collection[str] | None = None
    ) -> Path:
        """A local folder with the artifact's verified files, to be read only.

        ``only`` names the files that are needed: others are not verified and may not be there.
        It may be ``into`` or a folder of the storage's own. Raises DamagedArtifact where a byte of
        them is missing or changed, or all of it is gone; CorruptArtifact where ``only`` names what
        is none of its files; Unavailable.
        """
        ...

    def manifest(self, path: str) -> Manifest:
        """Raises NotFound where no artifact is, DamagedArtifact where its manifest is broken."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file or an artifact; nothing there is fine. Raises Unavailable."""
        ...
