"""A prepared set as it lies in ``processed/<model>_<version>/``.

::

    manifest.json            what it was made of, and every file's size and sha256; written last
    report.json              what was read, checked, split and tokenised
    report.md                the same of the validation, to read
    quarantine.jsonl         the rows that cannot be used; dropped.jsonl: too long, nothing trained
    training.safetensors, validation.safetensors, packs.safetensors, preparation.json, tokenizer/

A set is never changed, only replaced whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from llamahome.conversations.tokens import read_token_rows
from llamahome.errors import CorruptArtifact, InvalidState
from llamahome.local.bases import Model
from llamahome.local.tree import locked, recover, replace_folder
from llamahome.schemas import (
    MANIFEST_NAME,
    BaseRef,
    FileRef,
    JobSpec,
    JsonObject,
    ManifestEntry,
    PreparationReport,
    RunOutput,
    Stage,
    Step,
    ValidationReport,
)
from llamahome.schemas.base import Schema
from llamahome.storage import LocalStorage, hash_stream

SET_MANIFEST = "manifest.json"
SET_REPORT = "report.json"
# What training reads of a set, beside the report.
_PREPARED = (
    "training.safetensors", "validation.safetensors", "packs.safetensors", "preparation.json",
)  # fmt: skip
_TOKENIZER = "tokenizer"
_BESIDE = ("quarantine.jsonl", "report.md", "duplicates.json")
# The settings that decide what is in a set.
_DECIDING = (
    "max_length", "validation_split", "seed", "packing", "loss_scope", "template", "too_long",
    "duplicates", "max_invalid_share", "validation",
)  # fmt: skip


class SideMetrics(Schema):
    """One side of the split in tokens; ``padded_share`` is how much of batches that are padded to
    ``max_length`` would be padding (training pads nothing)."""

    rows: int
    shortest: int
    mean: float
    longest: int
    padded_share: float


class ProcessReport(Schema):
    """``report.json``, and what ``process_samples`` returns.

    ``folder`` is the set's, "" where there were no samples: then both reports are None.
    """

    model: str
    version: str | None
    folder: str = ""
    files: tuple[str, ...] = ()
    validation: ValidationReport | None = None
    preparation: PreparationReport | None = None
    metrics: dict[str, SideMetrics] = Field(default_factory=dict)


class SetManifest(Schema):
    """``samples``, ``base`` (its digest) and ``settings`` decide what is in the set, and nothing
    else is told of how it was made. ``summaries`` are what the data stages returned."""

    v: Literal[1] = 1
    model: str
    version: str
    base: str
    samples: tuple[FileRef, ...]
    settings: JsonObject
    summaries: dict[Stage, JsonObject]
    files: tuple[ManifestEntry, ...]

    def check(self, config: JsonObject, place: Path, base: BaseRef | None = None) -> None:
        """Raises InvalidState where ``config`` or ``base`` ask for other data than these."""
        found = []
        if base is not None and self.base != base.digest:
            found.append("base")
        for key in _DECIDING:
            then, now = self.settings.get(key), config[key]
            if then != now:
                found.append(f"{key} ({then!r}, now {now!r})")
        if found:
            raise InvalidState(
                f"the prepared set was made with another {', '.join(found)}", file=str(place),
                code="processed_mismatch",
                remedy=f"Call process_samples({self.model!r}, {self.version!r}) again, with these "
                "settings",
            )  # fmt: skip


def lay_out(
    folder: Path,
    storage: LocalStorage,
    outputs: Mapping[Stage, RunOutput],
    spec: JobSpec,
    model: Model,
) -> ProcessReport:
    """Make a set in ``folder`` of what both data stages published, which is moved. Raises OSError.

    Nothing in it names the machine or the time.
    """
    folder.mkdir()
    checked, prepared = (_place(storage, outputs[stage]) for stage in _STAGES)
    for path in sorted(prepared.iterdir()):
        if path.name != MANIFEST_NAME:
            path.rename(folder / path.name)
    for name in _BESIDE:
        (checked / name).rename(folder / name)
    report = ProcessReport(
        model=model.name,
        version=model.version,
        files=tuple(file.filename for file in spec.training_files),
        validation=ValidationReport.model_validate_json((checked / SET_REPORT).read_bytes()),
        preparation=PreparationReport.model_validate_json((folder / _PREPARED[-1]).read_bytes()),
        metrics={
            side: _metrics(folder / f"{side}.safetensors", spec.config["max_length"])
            for side in ("training", "validation")
        },
    )
    _write(folder / SET_REPORT, report.model_dump_json(indent=2, exclude={"folder"}))
    manifest = SetManifest(
        model=model.name,
        version=model.version,
        base=spec.base.digest,
        samples=spec.training_files,
        settings={key: spec.config[key] for key in _DECIDING},
        summaries={stage: outputs[stage].summary for stage in _STAGES},
        files=tuple(_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()),
    )
    _write(folder / SET_MANIFEST, manifest.model_dump_json(indent=2))
    return report


def _metrics(path: Path, max_length: int) -> SideMetrics:
    lengths = read_token_rows(path).lengths
    rows, tokens = len(lengths), int(lengths.sum())
    return SideMetrics(
        rows=rows,
        shortest=int(lengths.min()) if rows else 0,
        mean=tokens / rows if rows else 0.0,
        longest=int(lengths.max(initial=0)),
        padded_share=1 - tokens / (rows * max_length) if rows else 0.0,
    )


_STAGES = (Stage.validation, Stage.preprocessing)


def _place(storage: LocalStorage, output: RunOutput) -> Path:
    assert output.artifact is not None, "both close steps publish"
    return storage.root / output.artifact.path


def put_in_place(made: Path, place: Path, model: Model) -> None:
    """Replace the set in ``place`` with the one just ``made``; an equal one that is whole stays.

    Raises InvalidState where something else is there, OSError.
    """
    with locked(place.parent):
        recover(place)
        there = read_manifest(place, model)
        if place.exists() and there is None:
            raise InvalidState(
                "is no prepared set", file=str(place), code="folder_not_empty",
                remedy="Move it away: process_samples would have to replace it",
            )  # fmt: skip
        if there is not None and there == read_manifest(made, model) and _is_whole(place, there):
            return
        replace_folder(made, place)


def read_manifest(place: Path, model: Model) -> SetManifest | None:
    """None where there is no set. Raises CorruptArtifact, and InvalidState where the set is of a
    model whose name and version are spelled alike when they are joined."""
    path = place / SET_MANIFEST
    if not path.is_file():
        return None
    try:
        found = SetManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorruptArtifact(
            str(error).splitlines()[0], file=str(path),
            remedy="Remove the folder and call process_samples again",
        ) from error  # fmt: skip
    if (found.model, found.version) != (model.name, model.version):
        raise InvalidState(
            f"is of {found.model!r} {found.version!r}, not of {model.name!r} {model.version!r}",
            file=str(place), code="name_taken", remedy="Give one of them another name",
        )  # fmt: skip
    return found


def take_snapshot(place: Path, model: Model, into: Path) -> SetManifest:
    """The set in ``place`` as it is now, verified, in the new folder ``into``: what comes into its
    place later does not change it. Files are linked where that can be.

    Raises InvalidState (there is none), CorruptArtifact, OSError.
    """
    with locked(place.parent):
        recover(place)
        manifest = read_manifest(place, model)
        if manifest is None:
            raise unprocessed(place, model)
        for entry in manifest.files:
            target = into / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(place / entry.name, target)
            except FileNotFoundError as error:
                raise _broken(place / entry.name, "is missing") from error
            except OSError:
                shutil.copyfile(place / entry.name, target)  # no links here, or too many
    for entry in manifest.files:
        found = _entry(into, into / entry.name)
        if found != entry:
            raise _broken(place / entry.name, "is not what process_samples wrote")
    return manifest


def unprocessed(place: Path, model: Model) -> InvalidState:
    return InvalidState(
        "there is no prepared set", file=str(place), code="not_processed",
        remedy=f"Call process_samples({model.name!r}, {model.version!r}) first",
    )  # fmt: skip


def _broken(path: Path, what: str) -> CorruptArtifact:
    return CorruptArtifact(what, file=str(path), remedy="Call process_samples again")


def publish_snapshot(folder: Path, manifest: SetManifest, storage: LocalStorage) -> list[RunOutput]:
    """The outputs of both data stages, as the training stage takes them, from a snapshot."""
    checked, prepared = folder.with_name("checked"), folder.with_name("prepared")
    checked.mkdir()
    report = ProcessReport.model_validate_json((folder / SET_REPORT).read_bytes()).validation
    assert report is not None, "a set has both reports"
    (checked / "report.json").write_text(report.model_dump_json())
    prepared.mkdir()
    for name in (*_PREPARED, _TOKENIZER):
        if (folder / name).exists():
            (folder / name).rename(prepared / name)
    outputs = []
    for stage, made, kind in zip(_STAGES, (checked, prepared), ("rows", "prepared"), strict=True):
        artifact = storage.publish(made, f"artifacts/{kind}", kind=kind, adopt=True)
        outputs.append(
            RunOutput(stage=stage, step=Step.close, shard=0, artifact=artifact,
                      summary=manifest.summaries[stage])
        )  # fmt: skip
    return outputs


def _entry(folder: Path, path: Path) -> ManifestEntry:
    with path.open("rb") as stream:
        size, sha256 = hash_stream(stream)
    return ManifestEntry(name=path.relative_to(folder).as_posix(), bytes=size, sha256=sha256)


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())


def _is_whole(place: Path, manifest: SetManifest) -> bool:
    try:
        return all(_entry(place, place / entry.name) == entry for entry in manifest.files)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
