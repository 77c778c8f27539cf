"""Processes that tests look for."""

from __future__ import annotations

import psutil


def engine_processes(parent: int | None = None) -> list[psutil.Process]:
    """The live training engines below ``parent``; None is this process."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if "llamahome.training.engine" in child.cmdline():
                found.append(child)
        except (psutil.ZombieProcess, psutil.NoSuchProcess):
            continue  # it has ended
    return found
