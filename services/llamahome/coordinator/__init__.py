"""The clockwork: what must happen although no worker is there to do it."""

from llamahome.coordinator.sweeper import Sweeper

__all__ = ["Sweeper"]
