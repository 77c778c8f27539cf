"""What a run is: the data, base and settings that decide its result."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Self

from llamahome.errors import InvalidState
from llamahome.schemas import JobSpec, JsonObject

_FORMAT = 1
# How the work is done, not what comes out; as training.digests.config_digest leaves them out.
_NOT_DECIDING = frozenset({"max_workers", "checkpointing.resume"})


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Digests of the files of both sides in their order, the base's, every setting, and the digest
    of the adapter that is gone on from."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    base: str
    config: JsonObject
    adapter: str | None = None

    @classmethod
    def of(cls, spec: JobSpec) -> Self:
        return cls(
            training=tuple(file.sha256 for file in spec.training_files),
            validation=tuple(file.sha256 for file in spec.validation_files),
            base=spec.base.digest,
            config=spec.config,
            adapter=spec.adapter.digest if spec.adapter is not None else None,
        )

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is none that can be read."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["v"] != _FORMAT:
                return None
            return cls(
                tuple(body["training"]), tuple(body["validation"]), body["base"], body["config"],
                body.get("adapter"),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace ``path`` at once. Raises OSError."""
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as out:
            json.dump({"v": _FORMAT, **dataclasses.asdict(self)}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)

    def check(self, now: RunRecord, folder: Path) -> None:
        """Raises InvalidState naming everything in which ``now`` differs."""
        if found := _differences(self, now):
            raise InvalidState(
                f"was begun with another {', '.join(found)}", file=str(folder),
                code="checkpoint_mismatch",
                remedy="Give what it was begun with, or name another folder with --out",
            )  # fmt: skip


def _differences(before: RunRecord, now: RunRecord) -> list[str]:
    found = []
    for name, then, today in (
        ("training data", before.training, now.training),
        ("validation data", before.validation, now.validation),
        ("base", (before.base,), (now.base,)),
        ("adapter", _one(before.adapter), _one(now.adapter)),
    ):
        if then != today:
            found.append(f"{name} (sha256 {_short(then)}, now {_short(today)})")
    then_flat, now_flat = _flat(before.config), _flat(now.config)
    for key in sorted(then_flat.keys() | now_flat.keys()):
        if key not in _NOT_DECIDING and then_flat.get(key) != now_flat.get(key):
            found.append(f"{key} ({then_flat.get(key)!r}, now {now_flat.get(key)!r})")
    return found


def _one(digest: str | None) -> tuple[str, ...]:
    return () if digest is None else (digest,)


def _short(digests: tuple[str, ...]) -> str:
    return " ".join(digest[:12] for digest in digests) or "none"


def _flat(values: JsonObject, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
