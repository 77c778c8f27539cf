"""One job's life, as a generator: it yields the work it wants done and is given the losses.

Everything that decides the result is a function of (spec, data, step), so a job stopped anywhere
and resumed from a checkpoint ends, on a CPU, with the same bytes as one that was never disturbed,
and so does one that shares its passes with others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeAlias

from llamahome.config import TrainingConfig
from llamahome.errors import Stopped, TrainingFailed
from llamahome.schemas import JobSpec, StopReason
from llamahome.training.checkpoints import (
    Snapshot,
    Tensors,
    TrainState,
)
from llamahome.training.data import TokenData, labelled_counts
from llamahome.training.digests import config_digest
from llamahome.training.engine.beginning import begin
from llamahome.training.engine.checks import check_factoring
from llamahome.training.engine.draws import DropKey
from llamahome.training.engine.merging import merge, plan_merging
from llamahome.training.engine.optimizer import SlotOptimizer
from llamahome.training.engine.outcome import write_result
from llamahome.training.engine.passes import Unit, make_unit
from llamahome.training.engine.saving import Saver
from llamahome.training.engine.warm import UnitLoss, WarmBase
from llamahome.training.gauges import Gauges
from llamahome.training.ports import TrainPorts
from llamahome.training.report import Reporter, finite
from llamahome.training.runtime import Machine, fingerprint
from llamahome.training.schedule import (
    Due,
    Plan,
    due_after_epoch,
    due_after_step,
    learning_rate,
)
from llamahome.training.steps import StepTaken
from llamahome.training.watching import NOBODY, Watcher

MAX_SKIPPED_IN_A_ROW = 3
# Small batches are offered together until a pass of them would no longer be bound by reading the
# base's weights; the engine packs as many of them as it has room for.
EVALUATION_TOKENS = 2048

# Work is a list of units; an empty one means: nothing until a save has ended.
Life: TypeAlias = Generator[list[Unit], Sequence[UnitLoss], Path]
Watch: TypeAlias = "Callable[[TrainingJob], Watcher]"


class TrainingJob:
    """What a job was given, and where it stands."""

    def __init__(
        self,
        spec: JobSpec,
        config: TrainingConfig,
        data: TokenData,
        ports: TrainPorts,
        machine: Machine,
        warm: WarmBase,
        saver: Saver,
        *,
        start: Tensors | None = None,
        watch: Watch | None = None,
    ) -> None:
        """``start`` are the weights of an earlier adapter to go on from; ``watch`` makes a watcher.

        Raises InvalidConfig for target modules that the base does not have, a start of others, and
        a base that cannot be merged into where that is asked for.
        """
        self.spec, self.config, self.data = spec, config, data
        self.ports, self.machine, self.warm = ports, machine, warm
        self.slot = warm.slot_for(config, data.added)
        if start is not None:
            self.slot.start_from(start)
        self._merging = plan_merging(warm, self.slot) if config.lora.merge else None
        self.optimizer = SlotOptimizer(self.slot, config)
        self.plan = Plan.of(config, len(data.training))
        self.gauges = Gauges.of(
            warm.model, self.slot.parameters, machine, warm.peak_memory.reader()
        )
        self.reporter = Reporter(ports, self.plan, config, self.gauges)
        self.state = TrainState()
        self.best: Tensors | None = None
        self.fingerprint = fingerprint(machine, config)
        self.identity = {
            "data": data.digest(),
            "base": spec.base.digest,
            "adapter": spec.adapter.digest if spec.adapter is not None else None,
            "config": config_digest(config),
        }
        self._labelled = labelled_counts(data.training)
        self.saver = saver
        self.saved_at: tuple[int, int | None] | None = None
        self._saved_here: int | None = None
        self.watcher: Watcher = NOBODY if watch is None else watch(self)

    def life(self, snapshot: Snapshot | None) -> Life:
        """Until the last step, an early stop, or a reason to stop. Returns the adapter's folder.

        Raises InvalidState (a checkpoint of another run), TrainingFailed (``nan_loss``,
        ``callback_failed``), Stopped, and OSError where a checkpoint cannot be written.
        """
        begin(self, snapshot)
        if self.state.step == 0:
            factoring = yield from check_factoring(self.slot, self.data.training)
            self.state.proofs["factoring"] = factoring
        self.watcher.train_begin(self.state)
        yield from self._act(self._due_after_step() | self._due_after_epoch())
        while not self.state.stopping.reason and self.state.place < self.plan.total_steps:
            yield from self.stop_if_asked()
            taken = yield from self._step()
            yield from self._after_step(taken)
        if self.state.stopping.reason:
            self.reporter.say(f"Stopped early: {self.state.stopping.reason}")
        yield from self._settle()
        folder = write_result(self)
        if self._merging is not None:
            yield from merge(self, self._merging, folder)
        self.watcher.train_end(self.state)
        return folder

    def stop_if_asked(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        reason = self.ports.should_stop()
        if reason is None:
            return
        if reason in (StopReason.pause, StopReason.drain):
            yield from self._checkpoint()
            yield from self._settle()
        raise Stopped(f"stopped after step {self.state.step}", code=reason.value)

    def _after_step(self, taken: StepTaken) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        """Evaluate and save as is due, and wanted: first by steps, then, where one ends, by epochs.

        There is one checkpoint a step at most: the later one, which knows of both evaluations.
        """
        wanted = self.watcher.step_end(self.state, taken, self._due_after_step())
        later = self._epoch_ends() and not wanted.evaluate and self._due_after_epoch().evaluate
        yield from self._act(Due(wanted.evaluate, wanted.save and not later))
        if self._epoch_ends():
            by_epoch = self.watcher.epoch_end(self.state, self._due_after_epoch())
            yield from self._act(by_epoch | Due(save=wanted.save))
            self._epoch_ends()

    def _epoch_ends(self) -> bool:
        """Whether no further step of this epoch is taken, as planned or as a watcher wants it."""
        state, steps = self.state, self.plan.steps_per_epoch
        if state.place < self.plan.total_steps and state.stopping.reason is None:
            state.stopping.reason = self.watcher.stop
        if self.watcher.leaves_epoch:
            state.left_out += -state.place % steps
        return state.stopping.reason is not None or state.place % steps == 0

    def _due_after_step(self) -> Due:
        return due_after_step(self.state.step, self.state.place, self.plan, self.config)

    def _due_after_epoch(self) -> Due:
        """An early stop ends the last epoch."""
        stopped = self.state.stopping.reason is not None
        return due_after_epoch(self.state.place, self.plan, self.config) | Due(stopped, stopped)

    def _act(self, due: Due) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        evaluates = due.evaluate and len(self.data.validation)
        if evaluates and self.state.evaluated_at != self.state.step:
            yield from self._evaluate_now()
            yield from self._checkpoint()
        elif due.save:
            yield from self._checkpoint()

    def _evaluate_now(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        state, started = self.state, time.monotonic()
        loss = yield from self._evaluate()
        state.evaluated_at, state.eval_loss = state.step, finite(loss)
        if state.step == 0:
            state.eval_loss_before = finite(loss)
        elif state.stopping.update(loss, state.step, self.config):
            self.best = self.slot.tensors()
        self.reporter.evaluated(state, loss)
        self.watcher.evaluated(state, loss, time.monotonic() - started)

    def _evaluate(self) -> Generator[list[Unit], Sequence[UnitLoss], float]:
        """Mean cross-entropy per labelled token over all validation rows, in nats, no dropout.

        The mean is over tokens, not over batches. NaN where no row has a label.
        """
        rows, size = self.data.validation, self.config.batch_size
        total, units = 0.0, list[Unit]()
        for first in range(0, len(rows), size):
            samples = range(first, min(first + size, len(rows)))
            units.append(make_unit(self.slot, rows, samples, weight=1.0, learns=False))
            wanted = sum(unit.tokens for unit in units)
            if wanted < EVALUATION_TOKENS and samples.stop < len(rows):
                continue
            self.reporter.beat()
            yield from self.stop_if_asked()
            for loss in (yield units):
                total += loss.summed
                self.watcher.evaluation_batch()
            units = []
        labelled = int(labelled_counts(rows).sum())
        return total / labelled if labelled else float("nan")

    def _step(self) -> Generator[list[Unit], Sequence[UnitLoss], StepTaken]:
        """One optimizer step: an accumulation window of micro-batches."""
        started = time.monotonic()
        state, step = self.state, self.state.step
        self.watcher.step_begin(state)
        windows = self.plan.micro_batches(state.place)
        samples = [int(sample) for window in windows for sample in window]
        labelled = int(self._labelled[samples].sum())
        # Divided by the labels of the whole window, not by each micro-batch's: however the rows are
        # cut into micro-batches, every labelled token weighs the same.
        weight = 1.0 / max(1, labelled)
        losses = yield [
            make_unit(
                self.slot, self.data.training, window, weight=weight, learns=True,
                drops=DropKey(self.config.seed, step, index),
            )
            for index, window in enumerate(windows)
        ]  # fmt: skip
        loss = sum(each.weighted for each in losses)
        rate = learning_rate(step, self.plan.total_steps, self.config)
        for _ in windows[1:]:
            self.watcher.micro_batch_end()
        norm = self.optimizer.step(loss, rate, self.watcher)
        tokens = int(self.data.training.lengths[samples].sum())
        taken = StepTaken(samples, loss, norm, rate, tokens, labelled)
        state.take(taken)
        if "first_step_moved" not in state.proofs and taken.finite:
            self._prove_liveness()
        if not taken.finite:
            self.reporter.skipped(state)
            self._fail_if_hopeless()
        self.reporter.stepped(state, taken, time.monotonic() - started)
        return taken

    def _prove_liveness(self) -> None:
        moved = self.slot.moved()
        self.state.proofs["first_step_moved"] = moved
        if not moved:
            self.reporter.say(
                f"After step {self.state.step} some part of the adapter has not moved", level="warn"
            )

    def _fail_if_hopeless(self) -> None:
        state = self.state
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"the loss or its gradient was not finite in {state.skipped_in_a_row} steps in a "
                f"row, the last of them step {state.step} of {self.plan.total_steps}",
                code="nan_loss",
                remedy="Lower learning_rate or max_grad_norm; the last good checkpoint is kept",
            )

    def _checkpoint(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        """Have it saved where the run stands, unless that is done (or nothing has happened) yet.

        The copy is taken here, between two steps; it is written while the run goes on.
        """
        state = self.state
        if state.step == 0 or self.saved_at == (state.step, state.evaluated_at):
            return
        if self._saved_here == state.step:
            return
        yield from self._settle()
        snapshot = Snapshot(
            state=state.copy(),
            adapter=self.slot.tensors(),
            optimizer=self.optimizer.tensors(),
            best=self.best,
            identity=self.identity,
            fingerprint=self.fingerprint,
        )
        self.saver.save(snapshot, self.config.checkpointing.save_total_limit)
        self.saved_at, self._saved_here = (state.step, state.evaluated_at), state.step
        if self.watcher.wants_saves_done:
            yield from self._settle()
        self.watcher.saved(state)

    def _settle(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        """Wait until what was to be saved is durable."""
        while not self.saver.settled():
            yield []
