"""Where things lie below the storage root. Every storage path is built here."""

from __future__ import annotations

from llamahome.storage.paths import checked_segment


def upload_path(tenant: str, sha256: str) -> str:
    """An uploaded file, immutable."""
    return f"uploads/{checked_segment(tenant)}/{checked_segment(sha256)}"


def artifact_path(key: str) -> str:
    """A stage output, addressed by the digest of everything that decides it."""
    return f"artifacts/{checked_segment(key)}"


def artifact_key(path: str) -> str | None:
    """The key of what lies at ``path``: the inverse of :func:`artifact_path`. None for another."""
    folder, _, key = path.partition("/")
    return key if folder == "artifacts" and key and "/" not in key else None


def attempt_path(job: str, run: str, fence: int) -> str:
    """What one attempt writes before it is accepted; no two attempts share it."""
    return f"jobs/{checked_segment(job)}/runs/{checked_segment(run)}/f{fence:d}"


def checkpoint_path(job: str, run: str, fence: int, step: int) -> str:
    """The resume point that an attempt took after optimizer step ``step``."""
    return f"{attempt_path(job, run, fence)}/checkpoint-{step:d}"


def model_path(job: str, fence: int) -> str:
    """The adapter that an attempt published."""
    return f"models/{checked_segment(job)}/f{fence:d}"
