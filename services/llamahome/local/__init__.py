"""Every stage in one process, with no broker, ledger or gateway."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llamahome.local.files import TrainedFiles, base_of_folder, train_files
from llamahome.local.inputs import read_adapter
from llamahome.local.pipeline import run_job
from llamahome.local.ports import LocalPorts
from llamahome.local.watch import Watch

if TYPE_CHECKING:
    from llamahome.local.callback import ProgressCallback
    from llamahome.local.dataset import ConversationDataset
    from llamahome.local.processed import ProcessReport
    from llamahome.local.training_data import TrainingData

# Imported when they are asked for: the first two need torch, the others rich.
_LAZY = {
    "ConversationDataset": "dataset",
    "ProgressCallback": "callback",
    "ProcessReport": "processed",
    "TrainingData": "training_data",
}

__all__ = [
    "ConversationDataset",
    "LocalPorts",
    "ProcessReport",
    "ProgressCallback",
    "TrainedFiles",
    "TrainingData",
    "Watch",
    "base_of_folder",
    "read_adapter",
    "run_job",
    "train_files",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
