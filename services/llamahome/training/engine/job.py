"""One job's life, as a generator: it yields the work it wants done and is given the losses.

Everything that decides the result is a function of (spec, data, step), so a job stopped anywhere
and resumed from a checkpoint ends, on a CPU, with the same bytes as one that was never disturbed,
and so does one that shares its passes with others.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from llamahome.config import TrainingConfig
from llamahome.errors import Stopped, TrainingFailed
from llamahome.schemas import JobSpec, StopReason, TrainingMetrics, TrainingReport
from llamahome.training.adapter import write_adapter
from llamahome.training.checkpoints import (
    Snapshot,
    Tensors,
    TrainState,
    check_identity,
    write_history,
)
from llamahome.training.data import TokenData, labelled_counts
from llamahome.training.digests import config_digest
from llamahome.training.engine.checks import check_factoring, check_isolation
from llamahome.training.engine.draws import DropKey
from llamahome.training.engine.optimizer import SlotOptimizer
from llamahome.training.engine.passes import Unit, make_unit
from llamahome.training.engine.saving import Saver
from llamahome.training.engine.warm import UnitLoss, WarmBase
from llamahome.training.ports import TrainPorts
from llamahome.training.report import Reporter, finite
from llamahome.training.runtime import Machine, fingerprint
from llamahome.training.schedule import Plan, checkpoint_due, evaluation_due, learning_rate
from llamahome.training.steps import StepTaken

HISTORY_NAME = "history.jsonl"
MAX_SKIPPED_IN_A_ROW = 3

# Work is a list of units; an empty one means: nothing until a save has ended.
Life: TypeAlias = Generator[list[Unit], Sequence[UnitLoss], Path]


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
    ) -> None:
        """``start`` are the weights of an earlier adapter to go on from.

        Raises InvalidConfig for target modules that the base does not have.
        """
        self.spec, self.config, self.data = spec, config, data
        self.ports, self.machine, self.warm = ports, machine, warm
        self.slot = warm.slot_for(config)
        if start is not None:
            self.slot.load(start)
        self.optimizer = SlotOptimizer(self.slot, config)
        self.plan = Plan.of(config, len(data.training))
        self.reporter = Reporter(ports, self.plan, config)
        self.state = TrainState()
        self.best: Tensors | None = None
        self.fingerprint = fingerprint(machine, config)
        self.identity = {
            "data": data.digest(),
            "base": spec.base.digest,
            "config": config_digest(config),
        }
        self._labelled = labelled_counts(data.training)
        self.saver = saver
        self._saved: tuple[int, int | None] | None = None

    def life(self, snapshot: Snapshot | None) -> Life:
        """Until the last step, an early stop, or a reason to stop. Returns the adapter's folder.

        Raises InvalidState (a checkpoint of another run), TrainingFailed (``nan_loss``), Stopped,
        and OSError where a checkpoint cannot be written.
        """
        self._start(snapshot)
        if self.state.step == 0:
            self.state.proofs["factoring"] = check_factoring(
                self.warm, self.slot, self.data.training
            )
        while True:
            evaluated = yield from self._evaluate_if_due()
            if evaluated or checkpoint_due(self.state.step, self.plan, self.config):
                yield from self._checkpoint()
            if self.state.stopping.reason or self.state.step == self.plan.total_steps:
                break
            yield from self._stop_if_asked()
            yield from self._step()
        if self.state.stopping.reason:
            self.reporter.say(f"Stopped early: {self.state.stopping.reason}")
        yield from self._settle()
        return self._write()

    def _start(self, snapshot: Snapshot | None) -> None:
        if self.machine.note is not None and snapshot is None:
            self.ports.event(self.machine.note, level=self.machine.note_level)
        if self.warm.why_not is not None and snapshot is None:
            self.reporter.say(
                "Rows go through this base one by one, which is slower: " + self.warm.why_not
            )
        if not len(self.data.validation) and self.config.early_stopping.enabled:
            if snapshot is None:
                self.reporter.say(
                    "No validation rows: no evaluation, and early stopping is off", level="warn"
                )
        if snapshot is not None:
            self._resume(snapshot)
        self.reporter.started(self.state, self.config)

    def _resume(self, snapshot: Snapshot) -> None:
        check_identity(snapshot.identity, self.identity)
        changed = [
            name
            for name, value in self.fingerprint.items()
            if snapshot.fingerprint.get(name) != value
        ]
        if changed:
            self.reporter.say(
                f"Resumed under another {', '.join(changed)}: the result may differ in its last "
                "bits from an undisturbed run",
                level="warn",
            )
        self.state = snapshot.state
        self.slot.load(snapshot.adapter)
        self.optimizer.restore(snapshot.optimizer)
        at_best = self.state.stopping.best_step == self.state.step
        self.best = snapshot.adapter if at_best else snapshot.best
        self._saved = (self.state.step, self.state.evaluated_at)
        self.state.resumed_from.append(self.state.step)

    def _stop_if_asked(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        reason = self.ports.should_stop()
        if reason is None:
            return
        if reason in (StopReason.pause, StopReason.drain):
            yield from self._checkpoint()
            yield from self._settle()
        raise Stopped(f"stopped after step {self.state.step}", code=reason.value)

    def _evaluate_if_due(self) -> Generator[list[Unit], Sequence[UnitLoss], bool]:
        state = self.state
        if not len(self.data.validation) or state.evaluated_at == state.step:
            return False
        if not evaluation_due(state.step, self.plan, self.config):
            return False
        loss = yield from self._evaluate()
        state.evaluated_at, state.eval_loss = state.step, finite(loss)
        if state.step == 0:
            state.eval_loss_before = finite(loss)
        elif state.stopping.update(loss, state.step, self.config):
            self.best = self.slot.tensors()
        self.reporter.evaluated(state, loss)
        return state.step > 0

    def _evaluate(self) -> Generator[list[Unit], Sequence[UnitLoss], float]:
        """Mean cross-entropy per labelled token over all validation rows, in nats, no dropout.

        The mean is over tokens, not over batches. NaN where no row has a label.
        """
        rows, size = self.data.validation, self.config.batch_size
        total = 0.0
        for first in range(0, len(rows), size):
            self.reporter.beat()
            yield from self._stop_if_asked()
            samples = range(first, min(first + size, len(rows)))
            unit = make_unit(self.slot, rows, samples, weight=1.0, learns=False)
            (loss,) = yield [unit]
            total += loss.summed
        labelled = int(labelled_counts(rows).sum())
        return total / labelled if labelled else float("nan")

    def _step(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        """One optimizer step: an accumulation window of micro-batches."""
        started = time.monotonic()
        state, step = self.state, self.state.step
        windows = self.plan.micro_batches(step)
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
        norm = self.optimizer.step(loss, rate)
        tokens = int(self.data.training.lengths[samples].sum())
        taken = StepTaken(samples, loss, norm, rate, tokens, labelled)
        state.take(taken)
        if "first_step_moved" not in state.proofs and taken.finite:
            self._prove_liveness()
        if not taken.finite:
            self.reporter.skipped(state)
            self._fail_if_hopeless()
        self.reporter.stepped(state, taken, time.monotonic() - started)

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
        if state.step == 0 or self._saved == (state.step, state.evaluated_at):
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
        self._saved = (state.step, state.evaluated_at)

    def _settle(self) -> Generator[list[Unit], Sequence[UnitLoss], None]:
        """Wait until what was to be saved is durable."""
        while not self.saver.settled():
            yield []

    def _write(self) -> Path:
        """The adapter to publish: the best weights where early stopping watched, else the last."""
        if self.best is not None and self.config.early_stopping.enabled:
            self.slot.load(self.best)
        self.state.proofs["adapter_moved"] = self.slot.moved()
        self.state.proofs["isolation"] = check_isolation(self.warm, self.slot, self.data.training)
        folder = self.ports.scratch / "adapter"
        write_adapter(
            folder, self.slot, self.config.lora, self.spec.base.name, self.warm.transposed
        )
        write_history(folder / HISTORY_NAME, self.state.history)
        return folder

    def report(self, *, base_unchanged: bool) -> TrainingReport:
        state, stopping = self.state, self.state.stopping
        restored = self.best is not None and self.config.early_stopping.enabled
        extra: dict[str, Any] = {
            "step_ledger": state.step_ledger,
            "skipped_steps": state.skipped_steps,
        }
        epoch = self.plan.epoch_of(state.step)
        proofs = {key: value for key, value in state.proofs.items() if key != "adapter_moved"}
        return TrainingReport(
            steps=state.step,
            epochs=epoch,
            seed=self.config.seed,
            eval_loss_before=state.eval_loss_before,
            eval_loss_after=stopping.best_loss if restored else state.eval_loss,
            best_step=stopping.best_step,
            best_eval_loss=stopping.best_loss,
            stopped_early=stopping.reason,
            trained_tokens=state.trained_tokens,
            trainable_parameters=self.slot.parameters,
            base_unchanged=base_unchanged,
            adapter_moved=bool(state.proofs["adapter_moved"]),
            resumed_from=tuple(state.resumed_from),
            precision=self.machine.precision,
            mode=self.config.mode,
            metrics=TrainingMetrics(
                train_loss=state.train_loss,
                eval_loss=state.eval_loss,
                learning_rate=state.learning_rate,
                epoch=epoch,
                step=state.step,
            ),
            proofs=proofs,
            fingerprint={**self.fingerprint, **extra},
        )
