"""Training: token rows to a LoRA adapter.

The stage function (``stage``) supervises an engine process (``engine``), which runs the loop
(``loop``) on a base that it keeps warm. Only ``loop`` and what it imports touch torch.
"""

from llamahome.training.ports import LocalCheckpoint, TrainedAdapter, TrainPorts
from llamahome.training.stage import key, make_stage, run, shutdown_engine
from llamahome.training.tiny import make_tiny

__all__ = [
    "LocalCheckpoint",
    "TrainPorts",
    "TrainedAdapter",
    "key",
    "make_stage",
    "make_tiny",
    "run",
    "shutdown_engine",
]
