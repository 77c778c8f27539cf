"""The sample files that come with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from llamahome.errors import NotFound, nearest


def sample_path(name: str) -> Path:
    """The bundled sample ``name`` (``support.jsonl``, say). Raises NotFound naming the nearest."""
    folder = Path(str(resources.files("llamahome.conversations"))) / "samples"
    known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if name not in known:
        raise NotFound(f"no sample {name!r} in the package", remedy=nearest(name, known))
    return folder / name
