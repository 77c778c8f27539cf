"""Every stage in one process, with no broker, ledger or gateway."""

from llamahome.local.pipeline import run_job
from llamahome.local.ports import LocalPorts

__all__ = ["LocalPorts", "run_job"]
