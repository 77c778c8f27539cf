"""A prepared set in, a fine-tuned model in SPEC's tree out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llamahome.config import Settings, TrainingConfig
from llamahome.errors import CorruptArtifact, InvalidState
from llamahome.local.attempts import train_in_attempts
from llamahome.local.bases import Model
from llamahome.local.files import TrainedFiles
from llamahome.local.folder import WEIGHTS_NAME, OutFolder, held
from llamahome.local.kept import KeptCheckpoints
from llamahome.local.processed import SetManifest, publish_snapshot, take_snapshot
from llamahome.local.record import RunRecord
from llamahome.local.samples import TENANT
from llamahome.local.tree import Tree, locked, recover, replace_folder
from llamahome.local.watch import Watch
from llamahome.schemas import BaseRef, JobReport, JobSpec
from llamahome.storage import LocalStorage

_METRICS, _HISTORY = "training_metrics.json", "history.jsonl"
_FINISHED, _PUBLISHING = "finished.json", "publishing.json"


@dataclasses.dataclass(frozen=True)
class Fitting:
    """All that decides a fine-tuned model, beside its prepared set."""

    tree: Tree
    model: Model
    base: BaseRef
    config: TrainingConfig
    settings: Settings

    @property
    def place(self) -> Path:
        return self.tree.finetuned / f"{self.model.label}_finetuned"


def fit(wanted: Fitting, watch: Watch) -> TrainedFiles:
    """Train on the prepared set; the model appears in its place whole, then its metrics.

    With ``checkpointing.resume`` it goes on from the newest whole checkpoint of the same data, base
    and settings, and a model that such a run has finished is returned as it is.
    Raises InvalidState (no set, a set made otherwise, another run works on the model),
    CorruptArtifact, and as :func:`~llamahome.local.files.train_files`.
    """
    root = wanted.tree.checkpoints / wanted.model.label
    try:
        with held(root) as folder:
            return _Fit(wanted, folder, watch).result()
    except InvalidState as error:
        if error.code != "folder_in_use":
            raise
        raise InvalidState(
            error.message, file=str(root), code=error.code,
            remedy="Wait for it to end: two runs of one model would undo each other",
        ) from None  # fmt: skip


class _Fit:
    """One call, in the held folder of its model's checkpoints."""

    def __init__(self, wanted: Fitting, folder: OutFolder, watch: Watch) -> None:
        self._wanted, self._folder, self._watch = wanted, folder, watch
        self._marker = folder.root / _FINISHED
        self._publishing = folder.root / _PUBLISHING

    def result(self) -> TrainedFiles:
        wanted, folder = self._wanted, self._folder
        snapshot = folder.root / "snapshot"
        shutil.rmtree(snapshot, ignore_errors=True)  # of a run that was killed
        try:
            manifest = take_snapshot(
                wanted.tree.processed / wanted.model.label, wanted.model, snapshot / "set"
            )
            spec = self._spec(manifest)
            record = RunRecord.of(spec)
            resume = self._goes_on(record)
            if resume and self._is_finished():
                return TrainedFiles(wanted.place, _report(wanted.place), trained=False)
            self._marker.unlink(missing_ok=True)
            if folder.finished and not self._is_to_publish():
                # What a publication that died half-way took out of the model's place.
                shutil.rmtree(folder.adapter)
            if not (resume and folder.finished):
                self._publishing.unlink(missing_ok=True)
                shutil.rmtree(folder.adapter, ignore_errors=True)
                self._train(spec, record, manifest, snapshot, resume=resume)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
        self._publish()
        return TrainedFiles(wanted.place, _report(wanted.place), trained=True)

    def _spec(self, manifest: SetManifest) -> JobSpec:
        """The set's job with this call's settings. Raises InvalidState where the set is another."""
        wanted = self._wanted
        config = wanted.config.model_dump(mode="json")
        manifest.check(config, wanted.tree.processed / wanted.model.label, wanted.base)
        return JobSpec(
            tenant=TENANT, base=wanted.base, config=config, training_files=manifest.samples,
            shard_bytes=wanted.settings.shard_bytes,
        )  # fmt: skip

    def _goes_on(self, record: RunRecord) -> bool:
        """Whether what is in the folder is of the same run, and is to be used."""
        before = self._folder.record()
        if before is None or not self._wanted.config.checkpointing.resume:
            return False
        try:
            before.check(record, self._folder.root)
        except InvalidState as error:
            if self._folder.has_checkpoints:
                self._watch.warn(
                    f"The earlier run {error.message}: its checkpoints are not used, and training "
                    "starts afresh"
                )
            return False
        return True

    def _is_finished(self) -> bool:
        """Whether the model in its place is the one that this run made."""
        weights = self._wanted.place / WEIGHTS_NAME
        if not (self._marker.is_file() and weights.is_file()):
            return False
        marked: Any = json.loads(self._marker.read_text(encoding="utf-8"))
        return bool(marked.get("weights") == _sha256(weights))

    def _is_to_publish(self) -> bool:
        """Whether the finished adapter is the new one, not the one it has changed places with."""
        if not self._publishing.is_file():
            return True
        marked: Any = json.loads(self._publishing.read_text(encoding="utf-8"))
        return bool(marked.get("weights") == _sha256(self._folder.adapter / WEIGHTS_NAME))

    def _train(
        self,
        spec: JobSpec,
        record: RunRecord,
        manifest: SetManifest,
        snapshot: Path,
        *,
        resume: bool,
    ) -> None:
        from llamahome.training import make_stage
        from llamahome.training.supervisor import WarmEngine

        wanted, folder = self._wanted, self._folder
        settings = wanted.settings.model_copy(update={"scratch": folder.scratch.resolve()})
        engine = WarmEngine()  # its own: another manager's training must not end with this one
        try:
            folder.begin(record, resume=resume)
            storage = LocalStorage(folder.work)
            storage.delete("artifacts")
            prepared = publish_snapshot(snapshot / "set", manifest, storage)
            published = train_in_attempts(
                spec, storage, prepared, folder.scratch, stage=make_stage(settings, engine),
                kept=KeptCheckpoints(storage, wanted.config.checkpointing.save_total_limit),
                watch=self._watch, max_attempts=settings.max_attempts,
            )  # fmt: skip
            engine.shutdown()  # its log lies in the scratch folder
            folder.finish(published)
        finally:
            try:
                engine.shutdown()
            finally:  # also where somebody cannot wait for it
                if not folder.finished:
                    folder.abandon()

    def _publish(self) -> None:
        wanted, adapter = self._wanted, self._folder.adapter
        weights = _sha256(adapter / WEIGHTS_NAME)
        contents = {name: (adapter / name).read_bytes() for name in (_METRICS, _HISTORY)}
        _replace(self._publishing, json.dumps({"weights": weights}).encode())
        with locked(wanted.tree.finetuned):
            recover(wanted.place)
            replace_folder(adapter, wanted.place)
        metrics, label = wanted.tree.metrics, wanted.model.label
        metrics.mkdir(parents=True, exist_ok=True)
        _replace(metrics / f"{label}.json", contents[_METRICS])
        _replace(metrics / f"{label}.history.jsonl", contents[_HISTORY])
        _replace(self._marker, json.dumps({"weights": weights}).encode())
        self._publishing.unlink()


def _report(place: Path) -> JobReport:
    path = place / "report.json"
    try:
        return JobReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptArtifact(f"no report of a training: {error}", file=str(path)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
