"""Files and a base in, an adapter in a folder out: a job with no broker, ledger or gateway."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llamahome.config import EarlierAdapter, Settings, TrainingConfig, load_settings
from llamahome.errors import (
    CorruptArtifact,
    InvalidData,
    InvalidState,
    NotFound,
)
from llamahome.local.attempts import data_stages, train_in_attempts
from llamahome.local.folder import OutFolder, held
from llamahome.local.inputs import (
    AdapterInput,
    Input,
    StorageWithInputs,
    read_adapter,
    read_inputs,
)
from llamahome.local.kept import KeptCheckpoints
from llamahome.local.pipeline import run_job
from llamahome.local.record import RunRecord
from llamahome.local.watch import Watch
from llamahome.schemas import (
    ArtifactRef,
    BaseRef,
    JobReport,
    JobSpec,
    RunOutput,
    Stage,
)
from llamahome.storage import LocalStorage
from llamahome.storage.bases import base_digest

if TYPE_CHECKING:
    from llamahome.training.callbacks import Callback
    from llamahome.training.supervisor import WarmEngine

_TENANT = "local"


@dataclasses.dataclass(frozen=True)
class TrainedFiles:
    """``adapter`` is the folder; ``trained`` is False where it was there already."""

    adapter: Path
    report: JobReport
    trained: bool


def base_of_folder(folder: Path) -> BaseRef:
    """A base that is not registered: it goes by its folder's name. Raises NotFound."""
    place = folder.resolve()
    if not (place / "config.json").is_file():
        raise NotFound(
            "holds no base model (no config.json)", file=str(folder), code="model_not_found",
            remedy="Name the folder of a model as transformers saves it",
        )  # fmt: skip
    return BaseRef(name=place.name, path=str(place), digest=base_digest(place))


def train_files(
    files: Sequence[Path],
    base: BaseRef,
    out: Path,
    *,
    config: TrainingConfig,
    validation_files: Sequence[Path] = (),
    adapter: Path | None = None,
    resume: bool = False,
    settings: Settings | None = None,
    watch: Watch | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainedFiles:
    """Run every stage here and leave the adapter in ``out/adapter``.

    ``adapter`` is the folder of an earlier one to go on from, as PEFT saves it; ``config`` must
    have its LoRA (:func:`read_adapter` tells).
    The bytes of its weights are, on a CPU, a function of the files, the base and the config,
    however often the run was stopped or killed in between. ``resume`` goes on from the newest
    checkpoint that is whole; where nothing is saved the run starts afresh, and where the adapter is
    there already it is returned. Without it, checkpoints of an unfinished run are set aside.
    With ``callbacks`` (transformers') the model is trained in this process, where they are, and not
    in one of its own.

    Raises InvalidConfig, InvalidData, NotFound (what was given; then nothing is left behind),
    InvalidState (the folder is in use, is finished, or is of another run), TrainingFailed, Stopped
    (``watch.should_stop``), WorkerLost (the engine died again and again), Unavailable, OSError.
    """
    assert files, "at least one file"
    training, validation = read_inputs(files, "training"), read_inputs(validation_files, "held")
    _refuse_empty(training)
    settings = settings or load_settings()
    spec = JobSpec(
        tenant=_TENANT, base=base, config=config.model_dump(mode="json"),
        training_files=tuple(each.ref for each in training),
        validation_files=tuple(each.ref for each in validation),
        shard_bytes=settings.shard_bytes,
    )  # fmt: skip
    earlier = read_adapter(adapter) if adapter is not None else None
    if earlier is not None:
        spec = _going_on(spec, earlier.earlier, earlier.ref, config, watch or Watch())
    with held(out) as folder:
        inputs = [*training, *validation]
        run = _Run(spec, config, inputs, folder, settings, watch or Watch(), earlier, callbacks)
        return run.result() if run.is_done(resume=resume) else run.train(resume=resume)


def _going_on(
    spec: JobSpec, earlier: EarlierAdapter, ref: ArtifactRef, config: TrainingConfig, watch: Watch
) -> JobSpec:
    """Raises InvalidConfig where ``config`` has another LoRA."""
    earlier.check(config)
    if earlier.base not in (None, spec.base.name, spec.base.path):
        watch.warn(
            f"The adapter was trained on {earlier.base!r} and goes on here on {spec.base.name!r}: "
            "the loss before training shows whether that is the same base"
        )
    return spec.model_copy(update={"adapter": ref, "adapter_name": earlier.name})


def _refuse_empty(training: Sequence[Input]) -> None:
    if not any(each.ref.bytes for each in training):
        raise InvalidData("the file is empty", file=str(training[0].place))


class _Run:
    """One run in a held folder."""

    def __init__(
        self,
        spec: JobSpec,
        config: TrainingConfig,
        inputs: Sequence[Input],
        folder: OutFolder,
        settings: Settings,
        watch: Watch,
        adapter: AdapterInput | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self._spec, self._inputs, self._folder, self._watch = spec, inputs, folder, watch
        self._limit = config.checkpointing.save_total_limit
        # What it leaves behind if it is killed lies where the next run finds and removes it.
        self._settings = settings.model_copy(update={"scratch": folder.scratch.resolve()})
        self._record = RunRecord.of(spec)
        self._adapter, self._callbacks = adapter, callbacks

    def is_done(self, *, resume: bool) -> bool:
        """True where the adapter is there and that is fine. Raises InvalidState where it is not."""
        folder = self._folder
        if not folder.lockable:
            self._watch.warn(
                f"{folder.root}: this file system has no locks; see to it that no other run uses it"
            )
        if folder.finished and not resume:
            raise InvalidState(
                "holds a finished adapter", file=str(folder.root), code="already_trained",
                remedy="Name another folder with --out; --resume accepts what is there",
            )  # fmt: skip
        if not folder.finished and folder.adapter.exists():
            raise InvalidState("is in the way", file=str(folder.adapter), code="folder_not_empty",
                               remedy="Remove it, or name another folder with --out")  # fmt: skip
        before = folder.record() if resume else None
        if before is not None and (folder.finished or folder.has_checkpoints):
            before.check(self._record, folder.root)
        return folder.finished

    def result(self, *, trained: bool = False) -> TrainedFiles:
        path = self._folder.adapter / "report.json"
        try:
            report = JobReport.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CorruptArtifact(f"no report of a training: {error}", file=str(path)) from error
        return TrainedFiles(self._folder.adapter, report, trained)

    def train(self, *, resume: bool) -> TrainedFiles:
        from llamahome.training.supervisor import WarmEngine

        engine = WarmEngine()  # its own: another run in this process must not end with this one
        try:
            if self._folder.begin(self._record, resume=resume):
                self._watch.warn(
                    f"Checkpoints of an unfinished run were set aside in {self._folder.earlier}; "
                    "--resume would have gone on from them"
                )
            storage = StorageWithInputs(self._folder.work, self._inputs, self._adapter)
            published = self._trained(storage, self._prepared(storage, resume=resume), engine)
            engine.shutdown()  # its log lies in the scratch folder
            self._folder.finish(published)
        finally:
            try:
                engine.shutdown()
            finally:  # also where somebody cannot wait for it
                if not self._folder.finished:
                    self._folder.abandon()
        return self.result(trained=True)

    def _prepared(self, storage: LocalStorage, *, resume: bool) -> list[RunOutput]:
        """What the data stages gave: now, or before the run was stopped."""
        before = self._read_outputs(storage) if resume else None
        if before is not None:
            return before
        for left in ("artifacts", "outputs.json"):
            storage.delete(left)
        outputs = run_job(
            self._spec, storage, self._folder.scratch, stages=data_stages(),
            on_event=self._watch.event, on_progress=self._watch.progress,
            should_stop=self._watch.should_stop,
        )  # fmt: skip
        found = list(outputs.values())
        self._folder.write_outputs([output.model_dump(mode="json") for output in found])
        for output in found:
            if output.stage is Stage.validation and output.artifact is not None:
                place = storage.root / output.artifact.path
                self._folder.keep_quarantine(place / "quarantine.jsonl")
        return found

    def _read_outputs(self, storage: LocalStorage) -> list[RunOutput] | None:
        """None where they are not all there and whole."""
        body = self._folder.read_outputs()
        if not isinstance(body, list):
            return None
        try:
            found = [RunOutput.model_validate(each) for each in body]
            for output in found:
                if output.artifact is not None:
                    storage.fetch(output.artifact, self._folder.scratch)
        except (ValidationError, CorruptArtifact, NotFound) as error:
            self._watch.warn(f"The prepared data are made again: {error}")
            return None
        return found

    def _trained(
        self, storage: LocalStorage, prepared: Sequence[RunOutput], engine: WarmEngine
    ) -> Path:
        """The published adapter."""
        from llamahome.training import make_stage
        from llamahome.training.watched import make_watched_stage

        stage = make_stage(self._settings, engine)
        if self._callbacks:
            stage = make_watched_stage(self._settings, self._callbacks)
        return train_in_attempts(
            self._spec, storage, prepared, self._folder.scratch, stage=stage,
            kept=KeptCheckpoints(storage, self._limit), watch=self._watch,
            max_attempts=self._settings.max_attempts,
        )  # fmt: skip
