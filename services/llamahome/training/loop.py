"""One training in this process: token rows and a base in, a LoRA adapter and its report out.

The engine process runs the same :class:`~llamahome.training.engine.ticks.Engine` with many jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.config import TrainingConfig, parse_training_config
from llamahome.errors import CorruptArtifact
from llamahome.schemas import JobSpec
from llamahome.training.checkpoints import Snapshot, load_checkpoint
from llamahome.training.continuing import load_start
from llamahome.training.data import TokenData
from llamahome.training.engine.job import Watch
from llamahome.training.engine.ticks import Engine
from llamahome.training.model import LoadedBase, check_fits, load_base
from llamahome.training.ports import TrainedAdapter, TrainPorts
from llamahome.training.runtime import Machine, Runtime, choose_machine, configured

if TYPE_CHECKING:
    from llamahome.training.callbacks import Callback


def train(
    spec: JobSpec,
    data: TokenData,
    ports: TrainPorts,
    *,
    runtime: Runtime | None = None,
    base: LoadedBase | None = None,
    resume: Path | None = None,
    adapter: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainedAdapter:
    """Train one adapter. ``base`` is used where it serves the spec; else the base is loaded.

    ``resume`` is a checkpoint folder of the same spec and data; a corrupt one is told of, and the
    run starts afresh; ``adapter`` is the folder of the earlier adapter that ``spec`` goes on from,
    as PEFT saves one. The base, warm or loaded here, is as before when this returns or raises;
    ``ports.scratch/adapter`` holds the result. ``callbacks`` are transformers' (see callbacks.py).
    Raises InvalidConfig and InvalidData (before any step), InvalidState (a checkpoint of another
    run), TrainingFailed (``nan_loss``, ``out_of_memory``, ``callback_failed``), Stopped
    (``ports.should_stop``).
    """
    config = parse_training_config(spec.config, source="job")
    data.check()
    snapshot = load_snapshot([resume] if resume is not None else [], ports)
    machine = machine_for(runtime or Runtime(), config, snapshot)
    start = None
    if adapter is not None:
        start = load_start(adapter, config, spec.adapter_name or "adapter", data.added)
    with configured(machine):
        if base is None or not base.serves(spec.base, machine):
            base = load_base(spec.base, machine)
        check_fits(base, data, config)
    ended: list[TrainedAdapter | Exception] = []
    engine = Engine(base, machine)
    try:
        engine.admit(
            spec, config, data, ports, machine, ended.append, snapshot=snapshot,
            start=start, watch=_watch(callbacks),
        )  # fmt: skip
        engine.run()
    finally:
        engine.close()
    (outcome,) = ended
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _watch(callbacks: Sequence[Callback]) -> Watch | None:
    if not callbacks:
        return None
    # Imported here: the Trainer's side of transformers costs a second that nobody else needs.
    from llamahome.training.callbacks import watch_with

    return watch_with(callbacks)


def load_snapshot(folders: Sequence[Path], ports: TrainPorts) -> Snapshot | None:
    """The first of the checkpoints that is whole; None where there is none.

    Each that is not is told of. Going back further only takes longer: the bytes in the end are the
    same from any of them, and from the start.
    """
    for index, folder in enumerate(folders):
        try:
            return load_checkpoint(folder)
        except CorruptArtifact as error:
            then = (
                "the one before is tried" if index + 1 < len(folders) else "training starts afresh"
            )
            ports.event(f"The checkpoint is corrupt, {then}: {error}", level="warn")
    return None


def machine_for(runtime: Runtime, config: TrainingConfig, snapshot: Snapshot | None) -> Machine:
    """The order of a sum depends on the number of threads: a resumed run keeps its checkpoint's."""
    threads = snapshot.fingerprint.get("threads") if snapshot is not None else None
    return choose_machine(runtime, config, threads)
