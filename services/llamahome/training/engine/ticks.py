"""The tick loop: jobs join and leave between ticks, and share the passes in between."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch

from llamahome.config import TrainingConfig
from llamahome.errors import Stopped
from llamahome.schemas import BaseRef, JobSpec, StopReason
from llamahome.training.checkpoints import Snapshot, Tensors
from llamahome.training.data import TokenData
from llamahome.training.engine.choosing import (
    Offer,
    choose,
    default_tick_tokens,
    start_virtual,
)
from llamahome.training.engine.job import Life, TrainingJob, Watch
from llamahome.training.engine.memory import (
    MemoryModel,
    Shape,
    failure_of,
    is_out_of_memory,
)
from llamahome.training.engine.outcome import training_report
from llamahome.training.engine.passes import Unit, split_unit
from llamahome.training.engine.saving import Saver
from llamahome.training.engine.slots import Slot
from llamahome.training.engine.warm import UnitLoss, WarmBase
from llamahome.training.model import LoadedBase, checksum
from llamahome.training.ports import TrainedAdapter, TrainPorts
from llamahome.training.runtime import Machine, configured

# What a job's end is told with: its adapter, or why there is none.
OnEnd: TypeAlias = Callable[[TrainedAdapter | Exception], None]
Inbox: TypeAlias = "queue.SimpleQueue[Callable[[], None]]"


@dataclasses.dataclass
class _Running:
    """A job on the engine: the generator that is its life, and the work it waits for."""

    job: TrainingJob
    life: Life
    on_end: OnEnd
    admitted: int
    virtual: int
    begun: bool = False
    part_tokens: int | None = None  # a unit with more is cut: it did not fit alone
    work: list[Unit] = dataclasses.field(default_factory=list)
    done: list[UnitLoss] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> list[Unit]:
        return self.work[len(self.done) :]


class Engine:
    """One warm base and the jobs on it. For one thread; ``inbox`` takes calls from others.

    What is put into ``inbox`` is called between two ticks.
    """

    def __init__(self, loaded: LoadedBase, machine: Machine, inbox: Inbox | None = None) -> None:
        self.machine = machine
        with configured(machine):
            self.warm = WarmBase(loaded, machine.threads)
        self.inbox: Inbox = inbox if inbox is not None else queue.SimpleQueue()
        self.memory = MemoryModel(
            Shape.of(loaded.model, loaded.dtype), loaded.device, machine.memory_bytes
        )
        self._most_tokens = machine.tick_tokens or default_tick_tokens(loaded)
        self.tick_tokens = self._most_tokens
        self._jobs: list[_Running] = []
        self._admitted = 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def close(self) -> None:
        """Wait for saves in hand and leave the base as it came."""
        self._executor.shutdown()
        self.warm.close()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def slots(self) -> list[Slot]:
        """The slots of the jobs at work, in the order of their admission."""
        return [running.job.slot for running in self._jobs]

    def serves(self, base: BaseRef, machine: Machine) -> bool:
        """True where a job of this base in this precision can be admitted."""
        return self.warm.loaded.serves(base, machine)

    def admit(
        self,
        spec: JobSpec,
        config: TrainingConfig,
        data: TokenData,
        ports: TrainPorts,
        machine: Machine,
        on_end: OnEnd,
        *,
        snapshot: Snapshot | None = None,
        start: Tensors | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Take a job in, between two ticks; what goes wrong with it is told to its ``on_end``.

        ``watch`` makes its watcher. Raises InvalidConfig where the base lacks its target modules,
        and TrainingFailed (``out_of_memory``) where there is no room for its adapter.
        """
        saver = Saver(ports, self._executor, lambda: self.inbox.put(_nothing))
        try:
            job = TrainingJob(
                spec, config, data, ports, machine, self.warm, saver, start=start, watch=watch
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise failure_of(error) from error
        virtual = start_virtual([running.virtual for running in self._jobs])
        running = _Running(job, job.life(snapshot), on_end, self._admitted, virtual)
        self._admitted += 1
        self._jobs.append(running)
        self._advance(running)

    def run(self) -> None:
        """Tick until no job is left."""
        while self.busy:
            self.tick(wait=True)

    def tick(self, *, wait: bool) -> None:
        """Hear what came in, and do one pass. With ``wait``, not before there is anything to do."""
        self._hear(wait and not any(running.left for running in self._jobs))
        for running in list(self._jobs):
            if not self._saves_go_on(running):
                continue
            if running.job.ports.should_stop() is StopReason.cancel:
                # Nothing of it will be kept, so it need not come to the end of its window.
                step = running.job.state.step
                self._end(running, Stopped(f"stopped after step {step}", code="cancel"))
            elif not running.work:
                self._advance(running)
        self._pass()

    def _saves_go_on(self, running: _Running) -> bool:
        """Hand on what has been written; a save that failed ends its job."""
        try:
            running.job.saver.settled()
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # told to its owner; the others' jobs go on
            self._end(running, failure_of(error))
            return False
        return True

    def _hear(self, wait: bool) -> None:
        try:
            while True:
                self.inbox.get(block=wait)()
                wait = False
        except queue.Empty:
            return

    def _advance(self, running: _Running) -> None:
        """Let a job take in its losses and say what it wants next."""
        losses, running.done, running.work = running.done, [], []
        try:
            with configured(running.job.machine):
                running.work = running.life.send(losses) if running.begun else next(running.life)
                running.begun = True
        except StopIteration as stop:
            self._finish(running, stop.value)
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # whatever it is, it is this job's own and told to its owner
            self._end(running, failure_of(error))

    def _finish(self, running: _Running, folder: Path) -> None:
        try:
            unchanged = checksum(self.warm.model) == self.warm.loaded.checksum
            report = training_report(running.job, base_unchanged=unchanged)
        except Exception as error:  # a lack of memory, on a device that is nearly full
            self._end(running, failure_of(error))
            return
        self._end(running, TrainedAdapter(folder, report))

    def _end(self, running: _Running, outcome: TrainedAdapter | Exception) -> None:
        running.life.close()
        running.job.saver.abandon()
        self._jobs.remove(running)
        self._grow()
        running.on_end(outcome)

    def _grow(self) -> None:
        """One job fewer: what did not fit beside it may now."""
        self.tick_tokens = self._most_tokens
        for running in self._jobs:
            running.part_tokens = None

    def _pass(self) -> None:
        """The next units of the jobs whose turn it is, through the base together."""
        chosen = self._choose()
        if not chosen:
            return
        units = [unit for running, count in chosen for unit in running.left[:count]]
        losses = self._run(units, [running for running, _ in chosen])
        if losses is None:
            return
        given = iter(losses)
        for running, count in chosen:
            running.virtual += sum(unit.tokens for unit in running.left[:count])
            running.done += [next(given) for _ in range(count)]
            running.job.reporter.beat()
            if not running.left:
                self._advance(running)

    def _choose(self) -> list[tuple[_Running, int]]:
        offers = [
            [
                Offer(
                    running.virtual, running.admitted,
                    (unit.learns, running.job.machine.deterministic, running.job.machine.threads),
                    unit.tokens, unit.longest,
                )
                for unit in running.left
            ]
            for running in self._jobs
        ]  # fmt: skip
        # A budget of nothing is a pass of one unit.
        counts = choose(offers, 0 if self.warm.why_apart else self.tick_tokens)
        return [(running, n) for running, n in zip(self._jobs, counts, strict=True) if n]

    def _run(self, units: list[Unit], owners: Sequence[_Running]) -> list[UnitLoss] | None:
        """The losses, or None where the pass did not fit in memory and is to be tried smaller.

        Dropout and order are functions of counters, so what is tried again gives the same numbers;
        only where one unit must be cut are sums taken in another order.
        """
        with configured(owners[0].job.machine):
            slots = {id(unit.slot): unit.slot for unit in units if unit.learns}.values()
            kept = []
            try:
                for slot in slots:
                    slot.keep_gradient()
                    kept.append(slot)
                return self._fitting(units, owners[0].part_tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                for slot in kept:
                    slot.undo_gradient()
                self._shrink(units, owners, error)
                return None

    def _fitting(self, units: list[Unit], part_tokens: int | None) -> list[UnitLoss]:
        tokens = sum(unit.tokens for unit in units)
        if units[0].learns:
            recomputation = self.warm.recomputation
            recomputation.layers = self.memory.layers_to_recompute(tokens, recomputation.most)
        if len(units) == 1 and part_tokens is not None and tokens > part_tokens:
            return [self._in_parts(units[0], part_tokens)]
        return self._one_pass(units)

    def _in_parts(self, unit: Unit, tokens: int) -> UnitLoss:
        losses = [self._one_pass([part])[0] for part in split_unit(unit, tokens)]
        return UnitLoss(sum(one.summed for one in losses), sum(one.weighted for one in losses))

    def _one_pass(self, units: list[Unit]) -> list[UnitLoss]:
        if not units[0].learns:
            return self.warm.run(units)
        tokens, recomputed = sum(unit.tokens for unit in units), self.warm.recomputation.layers
        self.memory.enforce(tokens, recomputed)
        device = self.warm.loaded.device
        if device.type != "cuda":
            return self.warm.run(units)
        self.warm.peak_memory.take()
        before = torch.cuda.memory_allocated(device)
        losses = self.warm.run(units)
        used = torch.cuda.max_memory_allocated(device) - before
        self.memory.observe(tokens, recomputed, used)
        return losses

    def _shrink(self, units: list[Unit], owners: Sequence[_Running], error: Exception) -> None:
        """Halve the tick, or cut what did not fit alone; a row that does not fit fails its job."""
        if self.warm.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        tokens, part_tokens = sum(unit.tokens for unit in units), owners[0].part_tokens
        if len(units) > 1:
            self.tick_tokens = tokens // 2
        elif len(units[0].rows) == 1 or (part_tokens or tokens) <= units[0].longest:
            self._end(owners[0], failure_of(error))
            return
        else:
            owners[0].part_tokens = min(part_tokens or tokens, tokens) // 2
        for running in owners:
            running.job.reporter.say(
                f"Out of memory with {tokens} tokens in a pass: it is done in smaller ones until "
                "a job has ended",
                level="warn",
            )


def _nothing() -> None:
    """Only to wake the loop."""
