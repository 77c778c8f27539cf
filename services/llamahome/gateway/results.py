"""What a job leaves behind: its adapter, its report, and the rows it could not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from llamahome.conversations import shift_lines
from llamahome.errors import InvalidState, NotFound, nearest
from llamahome.gateway.deps import GatewayDeps
from llamahome.gateway.files import chunks
from llamahome.gateway.objects import ArtifactObject, Listing
from llamahome.schemas import ArtifactRef, Job, JobReport, ManifestEntry, RunOutput, Stage, Step

REJECTED_NAME = "rejected.jsonl"


class Results:
    """Every method raises NotFound for a job that is not the tenant's."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._ledger = deps.ledger
        self._storage = deps.storage

    def artifacts(self, tenant: str, job_id: str) -> Listing[ArtifactObject]:
        """The adapter's files. Raises InvalidState until there is an adapter."""
        adapter = self._adapter(tenant, job_id)
        files = self._storage.manifest(adapter.path).files
        return Listing(
            data=[ArtifactObject(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in files]
        )

    def artifact(
        self, tenant: str, job_id: str, name: str
    ) -> tuple[ManifestEntry, Iterator[bytes]]:
        """One file of the adapter, already open. Raises InvalidState, NotFound, Unavailable.

        Only names that stand in the manifest are opened: a request cannot make up a path.
        """
        adapter = self._adapter(tenant, job_id)
        files = {entry.name: entry for entry in self._storage.manifest(adapter.path).files}
        if name not in files:
            raise NotFound(
                f"{job_id} has no file {name!r}", code="artifact_not_found", field="name",
                remedy=nearest(name, files),
            )  # fmt: skip
        return files[name], chunks(self._storage.open(f"{adapter.path}/{name}"))

    def _adapter(self, tenant: str, job_id: str) -> ArtifactRef:
        job = self._ledger.job(job_id, tenant)
        if job.adapter is None:
            raise _not_yet(job, "adapter")
        return job.adapter

    def report(self, tenant: str, job_id: str) -> JobReport:
        """Raises InvalidState until the job has succeeded."""
        job = self._ledger.job(job_id, tenant)
        report: Any = job.result.get("report")
        if report is None:
            raise _not_yet(job, "report")
        return JobReport.model_validate(report)

    def quarantine(self, tenant: str, job_id: str) -> Iterator[bytes]:
        """JSON lines: the rejected rows of the shards validated so far, in file order.

        Of a job that failed over its rows too. Reading raises Unavailable.
        """
        self._ledger.job(job_id, tenant)
        shards = [
            output
            for output in self._ledger.outputs(job_id)
            if (output.stage, output.step) == (Stage.validation, Step.shard)
        ]
        return self._rejected(shards)

    def _rejected(self, shards: list[RunOutput]) -> Iterator[bytes]:
        lines_before: Counter[tuple[str, int]] = Counter()
        for shard in shards:
            assert shard.artifact is not None, "a validation shard always publishes its rows"
            file = (shard.summary["split"], shard.summary["index"])
            with self._storage.open(f"{shard.artifact.path}/{REJECTED_NAME}") as stream:
                yield from shift_lines(stream, lines_before[file])
            lines_before[file] += shard.summary["lines"]


def _not_yet(job: Job, what: str) -> InvalidState:
    ended = "ended without" if job.state.terminal else "has not made"
    return InvalidState(f"job {job.id} is {job.state}; it {ended} its {what}", field="fine_tune_id")
