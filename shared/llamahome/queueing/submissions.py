"""The submission queue: jobs from services that have no code of ours, as one Celery message.

The only message with content, so the only task that is acknowledged late: killed before its
commit, it is delivered again, and a second delivery finds the first one's job.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import stamina
import structlog
from pydantic import ValidationError

from llamahome.config import Settings
from llamahome.config.logs import configure_logging
from llamahome.errors import (
    InvalidConfig,
    LlamaHomeError,
    OperatorError,
    QuotaExceeded,
    TransientError,
    Unauthenticated,
    UserError,
)
from llamahome.ledger import Ledger
from llamahome.queueing.admission import Admission, Wanted
from llamahome.queueing.names import SUBMISSIONS_QUEUE, SUBMIT_TASK
from llamahome.queueing.presence import Presence
from llamahome.queueing.worker import remap_sigterm, run_worker
from llamahome.schemas import SubmitMessage

ROLE = "submissions"
RETRY_SECONDS = 60.0
_LOG = structlog.get_logger(__name__)


class SubmissionDesk:
    """Takes one message at a time to admission; a sender hears nothing, so the ledger tells."""

    def __init__(self, ledger: Ledger, admission: Admission) -> None:
        self._ledger = ledger
        self._admission = admission

    def take(self, kwargs: dict[str, Any]) -> str | None:
        """Submit what the message asks for; the job's id, or None for one nobody may see.

        A message with a valid key that cannot run becomes a failed job. Raises TransientError
        when it should be delivered again.
        """
        try:
            message = SubmitMessage.model_validate(kwargs)
        except ValidationError as error:
            return self._malformed(kwargs, error)
        try:
            tenant = self._ledger.tenant_of(message.api_key)
        except Unauthenticated:
            _LOG.warning("submission with an unknown key", submission_id=message.submission_id)
            return None
        wanted = Wanted(
            model=message.model,
            training_file=message.training_file,
            validation_file=message.validation_file,
            config=message.config,
            recipe=message.recipe,
            suffix=message.suffix,
            metadata=message.metadata,
        )
        return self._submit(tenant, wanted, message.submission_id)

    def _submit(self, tenant: str, wanted: Wanted, submission_id: str) -> str:
        try:
            job, created = self._admission.submit(
                tenant, wanted, kind="celery", submission_id=submission_id
            )
        except (UserError, QuotaExceeded) as error:
            _LOG.warning("submission rejected", submission_id=submission_id, error=str(error))
            return self._admission.reject(
                tenant, wanted, error, kind="celery", submission_id=submission_id
            ).id
        except TransientError:
            raise  # the message is tried again
        except Exception as error:  # nothing else would ever tell its sender
            _LOG.exception("submission cannot be taken", submission_id=submission_id)
            reason = _unforeseen(error)
            return self._admission.reject(
                tenant, wanted, reason, kind="celery", submission_id=submission_id
            ).id
        _LOG.info("submission taken", submission_id=submission_id, job=job.id, new=created)
        return job.id

    def _malformed(self, kwargs: dict[str, Any], error: ValidationError) -> str | None:
        """A message we cannot read whole: its sender sees why, if we can tell who it is."""
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        reason = InvalidConfig(problem["msg"], code="invalid_submission", field=field)
        key, submission_id = kwargs.get("api_key"), kwargs.get("submission_id")
        if not (isinstance(key, str) and isinstance(submission_id, str) and submission_id):
            _LOG.warning("unreadable submission", error=str(reason))
            return None
        try:
            tenant = self._ledger.tenant_of(key)
        except Unauthenticated:
            _LOG.warning("unreadable submission with an unknown key", error=str(reason))
            return None
        wanted = Wanted(
            model=str(kwargs.get("model", "")), training_file=str(kwargs.get("training_file", ""))
        )
        return self._admission.reject(
            tenant, wanted, reason, kind="celery", submission_id=submission_id[:128]
        ).id


def _unforeseen(error: Exception) -> LlamaHomeError:
    if not isinstance(error, ValidationError):
        return OperatorError(f"{type(error).__name__}: {error}")
    problem = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    return InvalidConfig(problem["msg"], code="invalid_submission", field=field)


def main(settings: Settings, concurrency: int = 1) -> int:
    """Run the submissions worker in the foreground; returns the exit code."""
    configure_logging(settings, role=ROLE)
    check = Ledger(settings.ledger)
    check.check_revision()
    check.close()
    remap_sigterm()
    from celery import signals
    from celery.exceptions import Reject

    from llamahome.queueing.app import make_app
    from llamahome.queueing.doorbell import CeleryBell
    from llamahome.storage import open_storage

    app = make_app(settings)
    app.conf.worker_soft_shutdown_timeout = 5.0
    desks: list[SubmissionDesk] = []
    stack = ExitStack()

    @signals.setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
    def keep_our_logging(**_: Any) -> None:
        """Connected at all, celery leaves logging as it is."""

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def start(**_: Any) -> None:
        ledger = Ledger(settings.ledger)
        stack.callback(ledger.close)
        info = {"main_pid": os.getppid()}
        stack.enter_context(Presence(ledger, role=ROLE, settings=settings, slots=1, info=info))
        bell = CeleryBell(settings)
        admission = Admission(ledger, open_storage(settings.storage), settings, bell)
        desks.append(SubmissionDesk(ledger, admission))

    @signals.worker_process_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop(**_: Any) -> None:
        stack.close()

    # shared=False: otherwise a second app in this process would run the first one's function.
    @app.task(  # type: ignore[untyped-decorator]
        name=SUBMIT_TASK, shared=False, ignore_result=True, acks_late=True,
        reject_on_worker_lost=True,
    )  # fmt: skip
    def submit(**kwargs: Any) -> None:
        try:
            for attempt in stamina.retry_context(on=TransientError, timeout=RETRY_SECONDS):
                with attempt:
                    desks[0].take(kwargs)
        except TransientError as error:
            _LOG.warning("submission goes back to the queue", error=str(error))
            raise Reject(str(error), requeue=True) from error

    return run_worker(app, (SUBMISSIONS_QUEUE,), concurrency, "--max-tasks-per-child=1000")
