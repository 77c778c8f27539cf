"""``TrainingData``: samples in a folder, a fine-tuned model in it, from Python."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.config import (
    Settings,
    TrainingConfig,
    load_settings,
    parse_training_config,
    resolve_training_config,
)
from llamahome.errors import InvalidConfig, nearest
from llamahome.local.bars import SampleBars, training_watch
from llamahome.local.bases import Model, checked_name, find_base, find_model
from llamahome.local.files import TrainedFiles
from llamahome.local.fitting import Fitting, fit
from llamahome.local.processed import ProcessReport, SetManifest, read_manifest, unprocessed
from llamahome.local.samples import Preparation, prepare, sample_files
from llamahome.local.threads import Stopper, in_thread
from llamahome.local.tree import Tree, locked

if TYPE_CHECKING:
    from llamahome.local.loaders import DataLoaders

_log = logging.getLogger("llamahome.local")
_DEFAULT = 4  # of both sizes: a value equal to it leaves the word to the files
# The settings by the names that train_model has for them.
_KEYWORDS = {
    "num_epochs": ("epochs",),
    "learning_rate": ("learning_rate",),
    "lora_r": ("lora", "r"),
    "lora_alpha": ("lora", "alpha"),
    "lora_dropout": ("lora", "dropout"),
}


class TrainingData:
    """Manages training data processing and storage.

    An awaitable front of the stages that the queue workers run, on this machine, with no broker:
    the data stages in a thread, training in a process of its own. Settings, later beats earlier:
    defaults, ``.config/training_config.yaml``, its ``model_configs.<model>``, ``batch_size`` and
    ``max_workers`` where they are not 4, ``config``, the keywords of a call.
    ``data_dir`` has SPEC's tree (see :mod:`llamahome.local.tree`).
    """

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int = 4,
        max_workers: int = 4,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Initialize training data manager; ``data_dir`` is made where it is missing.

        No model is loaded here. Raises InvalidConfig naming the argument, OSError.
        """
        sizes = {"batch_size": batch_size, "max_workers": max_workers}
        parse_training_config(sizes, source="TrainingData")
        if config is not None and not isinstance(config, dict):
            raise InvalidConfig(f"must be a dict, not {config!r}", field="config")
        parse_training_config(copy.deepcopy(config or {}), source="config")
        self.data_dir = _made(data_dir)
        self.batch_size = batch_size
        self.max_workers = max_workers
        self.config: dict[str, Any] = copy.deepcopy(config or {})
        self._tree = Tree.of(self.data_dir)

    def effective_config(self, model_name: str = "llama", **keywords: Any) -> TrainingConfig:
        """The settings of a call with ``keywords`` (those of :meth:`train_model`).

        Raises InvalidConfig with the source and the field.
        """
        explicit = {
            name: value
            for name, value in (("batch_size", self.batch_size), ("max_workers", self.max_workers))
            if value != _DEFAULT
        }
        layers = [("TrainingData", explicit), ("config", copy.deepcopy(self.config))]
        name = checked_name(model_name, "model_name")
        try:
            return resolve_training_config(
                model_name=name, layers=[*layers, ("train_model", _nested(keywords))]
            )
        except InvalidConfig as error:
            if error.place.file != "train_model":
                raise
            raise _by_keyword(error) from None

    async def process_samples(
        self,
        model_name: str = "llama",
        model_version: str | None = None,
    ) -> ProcessReport:
        """Process and prepare training samples: ``processed/<model>_<version>``, whole or not at
        all, also where several do it at once. Returns its report.

        With no samples it warns and prepares nothing. A cancel leaves nothing behind.
        Raises InvalidConfig, NotFound (the model), InvalidData, InvalidState, OSError.
        """
        return await in_thread(lambda stop: self._process(model_name, model_version, stop))

    def _process(self, name: str, version: str | None, stop: Stopper) -> ProcessReport:
        config, settings = self.effective_config(name), load_settings()
        wanted = None if version is None else checked_name(version, "model_version")
        for folder in (self._tree.samples, self._tree.processed):
            _make(folder)
        files = sample_files(self._tree.samples)
        if not any(_has_content(path) for path in files):
            _log.warning("%s: no samples (*.jsonl), so none are prepared", self._tree.samples)
            return ProcessReport(
                model=name, version=wanted, files=tuple(path.name for path in files)
            )
        model = find_model(self._tree, name, wanted)
        base = find_base(self._tree, model)
        bars = SampleBars(files)
        with bars.progress:
            return prepare(
                Preparation(self._tree, model, base, files, config, settings),
                bars.watch(stop.reason), bars.file_done,
            )  # fmt: skip

    async def train_model(
        self,
        model_name: str = "llama",
        model_version: str | None = None,
        num_epochs: int | None = None,
        learning_rate: float | None = None,
        lora_r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
    ) -> TrainedFiles:
        """Train on the prepared set: ``models/finetuned/<model>_<version>_finetuned``, whole.

        Goes on from the newest checkpoint of the same data, base and settings, unless
        ``checkpointing.resume`` is false; a cancel saves one first. Returns the folder and report.
        Raises InvalidConfig, NotFound (the model), InvalidState (``not_processed``,
        ``processed_mismatch``, ``folder_in_use``), TrainingFailed, WorkerLost, CorruptArtifact,
        OSError.
        """
        keywords = {
            "num_epochs": num_epochs, "learning_rate": learning_rate, "lora_r": lora_r,
            "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
        }  # fmt: skip
        return await in_thread(
            lambda stop: self._train(model_name, model_version, keywords, load_settings(), stop)
        )

    def _train(
        self,
        name: str,
        version: str | None,
        keywords: dict[str, Any],
        settings: Settings,
        stop: Stopper,
    ) -> TrainedFiles:
        config = self.effective_config(name, **keywords)
        model = find_model(self._tree, name, version)
        self._manifest(model)  # before a large base is hashed
        base = find_base(self._tree, model)
        with training_watch(config, stop.reason) as watch:
            return fit(Fitting(self._tree, model, base, config, settings), watch)

    def dataloaders(
        self,
        model_name: str = "llama",
        model_version: str | None = None,
    ) -> DataLoaders:
        """(training, validation) torch DataLoaders over the prepared set; see
        :func:`llamahome.local.loaders.make_dataloaders`. Raises InvalidConfig, InvalidState."""
        from llamahome.local.loaders import make_dataloaders

        config = self.effective_config(model_name)
        model = find_model(self._tree, model_name, model_version)
        with locked(self._tree.processed):  # both sides of one set
            manifest = self._manifest(model)
            manifest.check(config.model_dump(mode="json"), self._tree.processed / model.label)
            return make_dataloaders(self._tree.processed / model.label, config)

    def _manifest(self, model: Model) -> SetManifest:
        """Raises InvalidState where there is no prepared set of the model."""
        place = self._tree.processed / model.label
        manifest = read_manifest(place, model)
        if manifest is None:
            raise unprocessed(place, model)
        return manifest


def _made(data_dir: object) -> Path:
    if not isinstance(data_dir, (str, Path)) or not str(data_dir) or "\0" in str(data_dir):
        raise InvalidConfig(f"must be a path, not {data_dir!r}", field="data_dir")
    path = Path(data_dir)
    _make(path, field="data_dir")
    return path


def _make(folder: Path, field: str | None = None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        remedy = "Move it away" if field is None else "Name a folder"
        raise InvalidConfig(
            "a file is in its place", file=str(folder), field=field, remedy=remedy
        ) from None


def _nested(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords as settings; None leaves the word to the others."""
    found: dict[str, Any] = {}
    for name, value in keywords.items():
        if name not in _KEYWORDS:
            raise InvalidConfig(
                "unknown keyword", code="unknown_parameter", file="train_model", field=name,
                remedy=nearest(name, _KEYWORDS),
            )  # fmt: skip
        if value is not None:
            *section, key = _KEYWORDS[name]
            place = found.setdefault(section[0], {}) if section else found
            place[key] = value
    return found


def _by_keyword(error: InvalidConfig) -> InvalidConfig:
    """The error with the field called as the caller called it."""
    names = {".".join(path): name for name, path in _KEYWORDS.items()}
    field = error.place.field or ""
    return InvalidConfig(
        error.message, code=error.code, remedy=error.remedy, file=error.place.file,
        field=names.get(field, field),
    )  # fmt: skip


def _has_content(path: Path) -> bool:
    """Whether reading it gives rows, or an error; blank lines alone are no samples."""
    if not path.is_file():
        return True
    with path.open("rb") as stream:
        return any(line.strip() for line in stream)
