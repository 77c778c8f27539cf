"""The door every submission passes, however it came: HTTP, command line or Celery message.

It resolves names to values (base, files, the effective configuration), checks them and the
tenant's quota, and writes the job. Accepted means durable; the doorbell after it is a courtesy.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from llamahome.config import Settings
from llamahome.errors import InvalidData, LlamaHomeError, NotFound, Unavailable, UserError
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import Bell
from llamahome.queueing.models import Start, effective_config, resolve_start
from llamahome.queueing.uris import is_allowed, open_uri
from llamahome.schemas import BaseRef, FileRef, Job, JobSpec, Stage, StoredFile
from llamahome.storage import Storage, layout

COPY_BYTES = 1024 * 1024
FINE_TUNE = "fine-tune"


class Wanted(NamedTuple):
    """What a submission asks for, in names. ``training_file`` is a file id or allow-listed URI."""

    model: str
    training_file: str
    validation_file: str | None = None
    config: Mapping[str, Any] = {}
    recipe: str | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] = {}
    min_examples: int = 1


class Admission:
    """Turns wishes into accepted jobs, and rings for them."""

    def __init__(self, ledger: Ledger, storage: Storage, settings: Settings, bell: Bell) -> None:
        self._ledger = ledger
        self._storage = storage
        self._settings = settings
        self._bell = bell

    def submit(
        self, tenant: str, wanted: Wanted, *, kind: str, submission_id: str | None = None
    ) -> tuple[Job, bool]:
        """Accept a job; the same (tenant, submission_id) again answers the first one's job.

        Returns the job and whether it is new. Raises a UserError naming what is wrong,
        QuotaExceeded, or Unavailable; then nothing was accepted.
        """
        if submission_id is not None:
            first = self._ledger.job_by_submission(tenant, submission_id)
            if first is not None:
                return first, False
        self._check_quota(tenant)
        spec = self._spec(tenant, wanted)
        job, created = self._ledger.submit(
            spec,
            kind=kind,
            submission_id=submission_id,
            max_attempts=self._settings.max_attempts,
            quota=self._settings.quota_active_jobs,
        )
        if created:
            self._bell.ring(Stage.validation, count=self._shards(spec))
        return job, created

    def reject(
        self, tenant: str, wanted: Wanted, error: LlamaHomeError, *, kind: str, submission_id: str
    ) -> Job:
        """Keep a submission that cannot run as a failed job, for a sender that hears no answer."""
        missing = FileRef(id="", filename=wanted.training_file[:200], path="", sha256="", bytes=0)
        spec = JobSpec(
            tenant=tenant,
            base=BaseRef(name=wanted.model[:64] or "unknown", path="", digest=""),
            training_files=(missing,),
            config={},
            shard_bytes=self._settings.shard_bytes,
        )
        job, _ = self._ledger.reject(spec, error, kind=kind, submission_id=submission_id)
        return job

    def start(self, tenant: str, model: str) -> Start:
        """What a training of ``model`` starts from; raises as :func:`resolve_start`."""
        return resolve_start(self._ledger, self._storage, tenant, model)

    def store_upload(
        self, tenant: str, *, filename: str, purpose: str, stream: BinaryIO
    ) -> StoredFile:
        """Keep an upload under its digest and register it.

        Raises InvalidData where it is larger than ``max_file_bytes``, Unavailable where it cannot
        be written; then nothing half-made stays.
        """
        limit = self._settings.max_file_bytes
        with contextlib.ExitStack() as stack:
            source = stream
            try:
                if stream.seekable():
                    digest, size = _hash(stream, limit, filename)
                else:
                    source = stack.enter_context(tempfile.TemporaryFile(dir=self._scratch()))
                    digest, size = _hash(stream, limit, filename, copy=source)
                source.seek(0)
            except OSError as error:
                raise Unavailable(
                    f"{filename} cannot be kept for now: {error.strerror or error}",
                    remedy="Free space in the scratch or temporary folder",
                ) from error
            path = layout.upload_path(tenant, digest)
            self._storage.put(path, source)
        return self._ledger.add_file(
            tenant, filename=filename, purpose=purpose, path=path, sha256=digest, bytes=size
        )

    def cancel(self, job_id: str, tenant: str) -> Job:
        return self._ledger.cancel(job_id, tenant)

    def pause(self, job_id: str, tenant: str) -> Job:
        return self._ledger.pause(job_id, tenant)

    def resume(self, job_id: str, tenant: str) -> Job:
        """Let a paused job go on, and wake whoever can take it."""
        job = self._ledger.resume(job_id, tenant)
        for stage in Stage:
            self._bell.ring(stage)
        return job

    def retry(self, job_id: str, tenant: str) -> Job:
        """A new job like an ended one; what that one finished is not done again.

        Raises NotFound, a UserError for a job that cannot be retried, QuotaExceeded.
        """
        old = self._ledger.job(job_id, tenant)
        if not old.state.terminal:
            raise UserError(
                f"job {job_id} is {old.state}", code="invalid_job_state",
                remedy="Wait for it to end, or cancel it",
            )  # fmt: skip
        if not old.spec.training_files[0].sha256:
            raise UserError(
                f"job {job_id} was rejected before it began: {old.error and old.error.message}",
                code="invalid_job_state", remedy="Submit it again, corrected",
            )  # fmt: skip
        job, _ = self._ledger.submit(
            old.spec,
            kind=old.kind,
            retry_of=old.id,
            max_attempts=self._settings.max_attempts,
            quota=self._settings.quota_active_jobs,
        )
        self._bell.ring(Stage.validation, count=self._shards(old.spec))
        return job

    def _spec(self, tenant: str, wanted: Wanted) -> JobSpec:
        start = self.start(tenant, wanted.model)
        config = effective_config(start, wanted.recipe, wanted.config)
        training = self._file(tenant, wanted.training_file, "training_file")
        validation: tuple[FileRef, ...] = ()
        if wanted.validation_file is not None:
            validation = (self._file(tenant, wanted.validation_file, "validation_file"),)
        return JobSpec(
            tenant=tenant,
            base=start.base,
            training_files=(training,),
            validation_files=validation,
            config=config.model_dump(mode="json"),
            shard_bytes=self._settings.shard_bytes,
            suffix=wanted.suffix,
            metadata=dict(wanted.metadata),
            min_examples=wanted.min_examples,
            adapter=start.adapter,
            adapter_name=wanted.model if start.adapter is not None else None,
        )

    def _file(self, tenant: str, name: str, field: str) -> FileRef:
        if "://" in name:
            return self._fetch_uri(tenant, name, field).ref()
        try:
            stored = self._ledger.file(name, tenant)
        except NotFound as error:
            raise NotFound(
                error.message, code="file_not_found", field=field, remedy="Upload it first"
            ) from None
        if stored.purpose != FINE_TUNE:
            raise InvalidData(
                f"{name} was uploaded with purpose {stored.purpose!r}, not {FINE_TUNE!r}",
                code="invalid_value", field=field, remedy="Upload it with purpose fine-tune",
            )  # fmt: skip
        if stored.bytes == 0:
            raise InvalidData("the file is empty", file=stored.filename, field=field)
        return stored.ref()

    def _fetch_uri(self, tenant: str, uri: str, field: str) -> StoredFile:
        """Copy an allow-listed object to our own storage, where it can no longer change."""
        if not is_allowed(uri, self._settings.uri_allowlist):
            raise UserError(
                f"{uri} is not below an allowed folder", code="uri_not_allowed", field=field,
                remedy="Upload the file and give its id, or have the operator extend "
                "LLAMAHOME_URI_ALLOWLIST",
            )  # fmt: skip
        with open_uri(uri, field) as stream:
            return self.store_upload(
                tenant, filename=uri.rsplit("/", 1)[-1], purpose=FINE_TUNE, stream=stream
            )

    def _check_quota(self, tenant: str) -> None:
        """Early, before anything is copied; what counts is the check that accepts the job."""
        quota = self._settings.quota_active_jobs
        if quota is not None:
            self._ledger.check_quota(tenant, quota)

    def _shards(self, spec: JobSpec) -> int:
        files = (*spec.training_files, *spec.validation_files)
        return sum(-(-max(file.bytes, 1) // spec.shard_bytes) for file in files)

    def _scratch(self) -> str:
        root = self._settings.scratch_root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return str(root)


def _hash(
    source: BinaryIO, max_bytes: int, filename: str, *, copy: BinaryIO | None = None
) -> tuple[str, int]:
    """(sha256 hex, bytes) of a stream, copied on the way. Raises InvalidData past ``max_bytes``."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(COPY_BYTES):
        size += len(chunk)
        if size > max_bytes:
            raise InvalidData(
                f"larger than {max_bytes} bytes", code="file_too_large", file=filename,
                remedy="Split it, or have the operator raise LLAMAHOME_MAX_FILE_BYTES",
            )  # fmt: skip
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest(), size
