"""The manifest: the file that is written last and makes a folder an artifact."""

from __future__ import annotations

from pydantic import Field

from llamahome.schemas.base import JsonObject, Schema

MANIFEST_NAME = "MANIFEST.json"


class ManifestEntry(Schema):
    """One file: its path below the folder (with forward slashes), size and digest."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str


class Manifest(Schema):
    """Every file of an artifact, sorted by name. The manifest itself is not listed."""

    v: int = 1
    kind: str
    files: tuple[ManifestEntry, ...]
    facts: JsonObject = Field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)
