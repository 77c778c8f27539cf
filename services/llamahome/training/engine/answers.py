"""How a job's end is told to the supervisor."""

from __future__ import annotations

import errno
import traceback

import torch

from llamahome.errors import LlamaHomeError, OperatorError, Stopped, Unavailable
from llamahome.schemas import StopReason
from llamahome.training.ports import TrainedAdapter
from llamahome.training.wire import Done, Failed, Halted


def answer(job: str, outcome: TrainedAdapter | Exception) -> Done | Halted | Failed:
    """Whatever happened, as one message; the traceback of what was not foreseen goes to the log."""
    match outcome:
        case TrainedAdapter() if outcome.report.base_unchanged:
            return Done(job=job, folder=str(outcome.folder), report=outcome.report)
        case TrainedAdapter():
            # Nothing that shares this base can be trusted: the process ends.
            changed = OperatorError("the base's weights changed while adapters were trained")
            return Failed(job=job, error=changed.to_dict(), fatal=True)
        case Stopped():
            reason = StopReason(outcome.code)
            return Halted(job=job, reason=reason, message=outcome.message)
        case LlamaHomeError():
            return Failed(job=job, error=outcome.to_dict(), fatal=False)
        case OSError():
            traceback.print_exception(outcome)
            return Failed(job=job, error=_from_os_error(outcome).to_dict(), fatal=False)
        case _:
            traceback.print_exception(outcome)
            # Raised outside the passes that jobs share, it is this job's own; after an error of the
            # device nothing in this process works any more.
            fatal = isinstance(outcome, torch.AcceleratorError)
            ours = OperatorError(f"{type(outcome).__name__}: {outcome}")
            return Failed(job=job, error=ours.to_dict(), fatal=fatal)


def _from_os_error(error: OSError) -> Unavailable:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return Unavailable(
        f"{type(error).__name__}: {error}", code="disk_full" if full else None,
        remedy="Free space in the scratch folder" if full else None,
    )  # fmt: skip
