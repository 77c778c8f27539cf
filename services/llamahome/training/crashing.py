"""Named places at which a process can be told to die, so that tests can have it die there.

``LLAMAHOME_CRASH_AT=NAME`` kills the process by SIGKILL when it first comes to that place,
``NAME:N`` when it comes there for the N-th time. ``NAME@FILE`` does so once in all: FILE is made at
the crash, and where it is, nothing happens.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

VARIABLE = "LLAMAHOME_CRASH_AT"
POINTS = (
    "after_tmp_write",
    "after_manifest",
    "after_rename",
    "before_pointer",
    "after_pointer",
    "during_gc",
)

_seen: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here, if that is what the environment says. The engine inherits no settings but this."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    place, _, flag = wanted.partition("@")
    point, _, count = place.partition(":")
    if point != name:
        return
    _seen[name] += 1
    if _seen[name] != int(count or 1) or (flag and Path(flag).exists()):
        return
    if flag:
        Path(flag).touch()
    os.kill(os.getpid(), signal.SIGKILL)
