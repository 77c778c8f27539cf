"""A warm base in the test's own process, and jobs on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llamahome.schemas import JobSpec
from llamahome.training.data import TokenData

if TYPE_CHECKING:
    from llamahome.training.engine.ticks import Engine
    from llamahome.training.ports import TrainedAdapter
    from llamahome.training.runtime import Machine

_NUMBERS = itertools.count()
Outcome = Any  # TrainedAdapter, or the exception that ended the job


@dataclasses.dataclass
class Bench:
    """Engines over one base in one precision; each call of :meth:`run` is a fresh engine."""

    spec: Callable[..., JobSpec]
    ports: Callable[..., Any]
    data: TokenData
    precision: str
    threads: int = 1

    def machine(self, **changes: Any) -> Machine:
        import torch

        from llamahome.training.runtime import Machine

        precision: Any = self.precision
        return Machine(torch.device("cpu"), precision, self.threads, True, **changes)

    def engine(self, **changes: Any) -> Engine:
        from llamahome.training.engine.ticks import Engine
        from llamahome.training.model import load_base

        machine = self.machine(**changes)
        return Engine(load_base(self.spec().base, machine), machine)

    def admit(self, engine: Engine, name: str, ended: dict[str, Outcome], **settings: Any) -> Any:
        """Admit a job; its end lands in ``ended[name]``. Returns its ports."""
        from llamahome.config import parse_training_config

        data, watch = settings.pop("data", self.data), settings.pop("watch", None)
        spec = self.spec(**settings)
        ports = self.ports(f"{name}-{next(_NUMBERS)}")

        def end(outcome: TrainedAdapter | Exception) -> None:
            ended[name] = outcome

        config = parse_training_config(spec.config, source="test")
        engine.admit(spec, config, data, ports, engine.machine, end, watch=watch)
        return ports

    def run(self, jobs: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Outcome]:
        """All jobs on one engine, from one tick on."""
        engine = self.engine(**changes)
        ended: dict[str, Outcome] = {}
        try:
            for name, settings in jobs.items():
                self.admit(engine, name, ended, **settings)
            engine.run()
        finally:
            engine.close()
        return ended


def weights(outcome: Outcome) -> dict[str, Any]:
    """The adapter's tensors; raises what ended the job without one."""
    from safetensors.torch import load_file

    if isinstance(outcome, Exception):
        raise outcome
    return load_file(outcome.folder / "adapter_model.safetensors")


def file_bytes(outcome: Outcome) -> bytes:
    if isinstance(outcome, Exception):
        raise outcome
    content: bytes = (outcome.folder / "adapter_model.safetensors").read_bytes()
    return content


def largest_gap(one: Outcome, other: Outcome) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
