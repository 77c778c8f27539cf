"""Creating a job once, however often its request arrives.

Each way of repeating a request becomes a ``submission_id``, which the ledger keeps unique within
a tenant in the transaction that makes the job:

- ``submission_id`` in the body is taken as it is.
- ``Idempotency-Key: K`` becomes ``idempotency-key:<sha256 of K>``.
- Neither: the stock OpenAI clients repeat a create that failed with the same bytes and say so
  (``x-stainless-retry-count`` >= 1), while equal creates that are meant have count 0. So the id is
  ``request-body:<sha256 of the body>:<window>:<n>``: the n-th create of these bytes in a window of
  600 s. Count 0 takes the first free n; a retry answers the newest one taken, if it is young
  enough. A retry that arrives while the first try is still being handled waits for it (a lock
  for each tenant and body). That lock holds within one process: behind several gateways, a retry
  must reach the one that still handles the first try, or come after it has answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Hashable, Iterator

from llamahome.errors import InvalidConfig, NotFound
from llamahome.gateway import names
from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.requests import CreateJob
from llamahome.gateway.wishes import Wish, wish_of
from llamahome.queueing.admission import Wanted
from llamahome.schemas import FileRef, Job

_URI = "://"


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One arrival of a create request: the parsed body, its bytes, and how it was sent."""

    tenant: str
    body: CreateJob
    raw: bytes
    idempotency_key: str | None
    retries: int


class JobCreation:
    """Requests to jobs; ``create`` may be called from many threads at once."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._ledger = deps.ledger
        self._admission = deps.admission
        self._locks = KeyedLocks()

    def create(self, attempt: Attempt) -> tuple[Job, bool]:
        """The job, and whether an earlier request made it already.

        Raises InvalidConfig or InvalidData with the parameter at fault, InvalidConfig (code
        ``idempotency_key_reuse``) when the id belongs to another request, QuotaExceeded,
        Unavailable.
        """
        submission_id = _given_id(attempt)
        if submission_id is None:
            return self._create_by_body(attempt)
        wish = self._wish(attempt)
        # Before the admission's checks: a repeated request is answered even at a full quota.
        first = self._ledger.job_by_submission(attempt.tenant, submission_id)
        if first is None:
            first, created = self._submit(attempt, wish, submission_id)
            if created:
                return first, False
        self._require_same(attempt, wish, first)
        return first, True

    def _create_by_body(self, attempt: Attempt) -> tuple[Job, bool]:
        digest = hashlib.sha256(attempt.raw).hexdigest()
        with self._locks.holding((attempt.tenant, digest)):
            now = self._ledger.clock()
            window = int(now) // names.RETRY_WINDOW_SECONDS
            taken, newest = self._taken(attempt.tenant, digest, window)
            if attempt.retries > 0:
                if newest is None:
                    _, newest = self._taken(attempt.tenant, digest, window - 1)
                if newest is not None and newest.created_at > now - names.RETRY_WINDOW_SECONDS:
                    return newest, True
            wish = self._wish(attempt)
            while True:
                submission_id = _body_id(digest, window, taken)
                job, created = self._submit(attempt, wish, submission_id)
                if created or attempt.retries > 0:
                    return job, not created
                taken += 1  # another gateway took this number for an equal create

    def _taken(self, tenant: str, digest: str, window: int) -> tuple[int, Job | None]:
        """How many numbers of the window are taken (0, 1, ... without gaps), and the newest job.

        Doubling, then halving: a few look-ups even after thousands of equal creates.
        """

        def at(number: int) -> Job | None:
            return self._ledger.job_by_submission(tenant, _body_id(digest, window, number))

        low, newest, step = 0, None, 1
        while (found := at(low + step - 1)) is not None:
            low, newest, step = low + step, found, step * 2
        high = low + step - 1  # the first number known to be free
        while low < high:
            middle = (low + high) // 2
            found = at(middle)
            if found is None:
                high = middle
            else:
                low, newest = middle + 1, found
        return low, newest

    def _submit(self, attempt: Attempt, wish: Wish, submission_id: str) -> tuple[Job, bool]:
        body = attempt.body
        wanted = Wanted(
            model=body.model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            config=wish.layer,
            recipe=body.recipe,
            suffix=body.suffix,
            metadata=body.metadata or {},
            min_examples=names.MIN_EXAMPLES,
        )
        with _wrong_names_as_values():
            return self._admission.submit(
                attempt.tenant, wanted, kind="http", submission_id=submission_id
            )

    def _wish(self, attempt: Attempt) -> Wish:
        with _wrong_names_as_values():
            start = self._admission.start(attempt.tenant, attempt.body.model)
        return wish_of(attempt.body, start)

    def _require_same(self, attempt: Attempt, wish: Wish, first: Job) -> None:
        """Raise unless the request asks for what made ``first``, field by field."""
        body, spec = attempt.body, first.spec
        pairs: dict[str, tuple[object, object]] = {
            "model": (body.model, spec.adapter_name or spec.base.name),
            "suffix": (body.suffix, spec.suffix),
            "metadata": (body.metadata or {}, spec.metadata),
            "config": (wish.effective.model_dump(mode="json"), spec.config),
        }
        different = [name for name, (asked, had) in pairs.items() if asked != had]
        files = {
            "training_file": (body.training_file, spec.training_files),
            "validation_file": (body.validation_file, spec.validation_files),
        }
        for name, (file_id, refs) in files.items():
            if not self._same_file(attempt.tenant, file_id, refs):
                different.append(name)
        if different:
            raise InvalidConfig(
                f"this id was used for {first.id}, which had another {', '.join(different)}",
                code="idempotency_key_reuse",
                field="submission_id" if body.submission_id else None,
                remedy="Send a new request with a new id",
            )

    def _same_file(self, tenant: str, file_id: str | None, refs: tuple[FileRef, ...]) -> bool:
        if file_id is None or not refs:
            return file_id is None and not refs
        if file_id == refs[0].id:
            return True
        if _URI in file_id:  # admission keeps a copy under the object's name
            return file_id.rpartition("/")[2] == refs[0].filename
        try:  # uploaded again, as a client does that starts over
            return self._ledger.file(file_id, tenant).sha256 == refs[0].sha256
        except NotFound:
            return False


@contextlib.contextmanager
def _wrong_names_as_values() -> Iterator[None]:
    """Within a create, a wrong name is a wrong value (400), not a missing page (404)."""
    try:
        yield
    except NotFound as error:
        raise InvalidConfig(
            error.message, code=error.code, field=error.place.field, remedy=error.remedy
        ) from None


class KeyedLocks:
    """A lock for each key that somebody holds or waits for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: dict[Hashable, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def holding(self, key: Hashable) -> Iterator[None]:
        with self._guard:
            lock, users = self._held.get(key, (threading.Lock(), 0))
            self._held[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._held.pop(key)
                if users > 1:
                    self._held[key] = (lock, users - 1)


def _given_id(attempt: Attempt) -> str | None:
    if attempt.body.submission_id is not None:
        return attempt.body.submission_id
    if attempt.idempotency_key is not None:
        digest = hashlib.sha256(attempt.idempotency_key.encode()).hexdigest()
        return f"{names.KEY_SUBMISSION_PREFIX}{digest}"
    return None


def _body_id(digest: str, window: int, number: int) -> str:
    return f"{names.BODY_SUBMISSION_PREFIX}{digest}:{window}:{number}"
