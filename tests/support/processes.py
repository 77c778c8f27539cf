"""Processes that tests look for."""

from __future__ import annotations

import psutil


def engine_processes(parent: int | None = None) -> list[psutil.Process]:
    """The live training engines among the children of ``parent``; None is this process.

    Not those further down: a fleet that a test keeps running has one, too.
    """
    found = []
    for child in psutil.Process(parent).children():
        try:
            if "llamahome.training.engine" in child.cmdline():
                found.append(child)
        except (psutil.ZombieProcess, psutil.NoSuchProcess):
            continue  # it has ended
    return found
