"""Every error that crosses a room, split by what the reader can do about it.

::

    LlamaHomeError
    ├── UserError                  fix the request; never retried
    │   ├── InvalidConfig          a setting or hyperparameter is wrong
    │   ├── InvalidData            a file or row cannot be used
    │   ├── NotFound               no such job, file, base, folder
    │   ├── InvalidState           right request, wrong moment
    │   ├── Unauthenticated        no key, or one nobody made
    │   └── TrainingFailed         the training itself cannot go on (NaN loss, out of memory)
    ├── TransientError             try again; retried with backoff
    │   ├── Unavailable            Redis, the ledger, storage or the gateway does not answer; costs
    │   │                          a run no attempt for an hour
    │   └── QuotaExceeded          the tenant has as much in flight as it may
    ├── OperatorError              ours; parked after max_attempts, kept for the operator
    │   ├── CorruptArtifact        bytes are not what they were when they were written
    │   │   └── DamagedArtifact    a published artifact: make it again under its path
    │   └── WorkerLost             the process that ran it is gone
    └── Stopped                    not a failure: somebody asked the work to end
        └── Fenced                 another attempt holds the run now; nothing may be committed

Each carries a stable ``code``, a message that names the values that disagree, the place (file,
line, field) and what to do about it. They travel as :meth:`LlamaHomeError.to_dict`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

__all__ = [
    "CorruptArtifact",
    "DamagedArtifact",
    "Fenced",
    "InvalidConfig",
    "InvalidData",
    "InvalidState",
    "LlamaHomeError",
    "NotFound",
    "OperatorError",
    "Place",
    "QuotaExceeded",
    "Stopped",
    "TrainingFailed",
    "TransientError",
    "Unauthenticated",
    "Unavailable",
    "UserError",
    "WorkerLost",
    "error_from_dict",
    "nearest",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where the trouble is; any part may be missing. ``line`` is 1-based."""

    file: str | None = None
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        at = self.file or ""
        if self.line is not None:
            at = f"{at}:{self.line}" if at else f"line {self.line}"
        return ", ".join(part for part in (at, self.field) if part)


class LlamaHomeError(Exception):
    """The root. ``code`` is stable and may be matched on; ``remedy`` says what to do."""

    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        remedy: str | None = None,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.remedy = remedy
        self.place = Place(file=file, line=line, field=field)

    def __str__(self) -> str:
        """One line a person can act on: ``place: message. remedy``."""
        where = str(self.place)
        text = f"{where}: {self.message}" if where else self.message
        return f"{text.rstrip('.')}. {self.remedy}" if self.remedy else text

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by :func:`error_from_dict`."""
        body: dict[str, Any] = {
            "kind": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "remedy": self.remedy,
        }
        return body | dataclasses.asdict(self.place)


class UserError(LlamaHomeError):
    default_code = "user_error"


class InvalidConfig(UserError):
    default_code = "invalid_value"


class InvalidData(UserError):
    default_code = "invalid_training_file"


class NotFound(UserError):
    default_code = "not_found"


class InvalidState(UserError):
    default_code = "invalid_job_state"


class Unauthenticated(UserError):
    default_code = "invalid_api_key"


class TrainingFailed(UserError):
    default_code = "training_failed"


class TransientError(LlamaHomeError):
    default_code = "unavailable"


class Unavailable(TransientError):
    pass


class QuotaExceeded(TransientError):
    default_code = "active_jobs_limit_exceeded"


class OperatorError(LlamaHomeError):
    default_code = "internal_error"


class CorruptArtifact(OperatorError):
    default_code = "corrupt_artifact"


class DamagedArtifact(CorruptArtifact):
    """An artifact's files or manifest are missing or changed; ``place.file`` is its storage path.

    Publishing it again at that path puts it right.
    """


class WorkerLost(OperatorError):
    default_code = "worker_lost"


class Stopped(LlamaHomeError):
    """Raised inside a stage when ``ports.should_stop()`` gave a reason, which is the code."""

    default_code = "drain"


class Fenced(Stopped):
    default_code = "fenced"


_KINDS: dict[str, type[LlamaHomeError]] = {
    kind.__name__: kind
    for kind in (
        LlamaHomeError, UserError, InvalidConfig, InvalidData, NotFound, InvalidState,
        Unauthenticated, TrainingFailed, TransientError, Unavailable, QuotaExceeded,
        OperatorError, CorruptArtifact, DamagedArtifact, WorkerLost, Stopped, Fenced,
    )
}  # fmt: skip


def error_from_dict(body: dict[str, Any]) -> LlamaHomeError:
    """The inverse of :meth:`LlamaHomeError.to_dict`; an unknown kind is an OperatorError."""
    kind = _KINDS.get(str(body.get("kind")), OperatorError)
    return kind(
        str(body.get("message", "no message")),
        code=body.get("code"),
        remedy=body.get("remedy"),
        file=body.get("file"),
        line=body.get("line"),
        field=body.get("field"),
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a mistyped name: the nearest known one, or the whole list when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names)}" if names else "None is known"
