"""The training loop: token rows and a base in, a LoRA adapter and its report out.

Everything that decides the result is a function of (spec, data, step), so a run stopped anywhere
and resumed from a checkpoint ends, on a CPU, with the same bytes as one that was never disturbed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from llamahome.config import TrainingConfig, parse_training_config
from llamahome.errors import CorruptArtifact, Stopped, TrainingFailed
from llamahome.schemas import JobSpec, StopReason, TrainingMetrics, TrainingReport
from llamahome.training.adapter import write_adapter
from llamahome.training.checkpoints import (
    Snapshot,
    Tensors,
    TrainState,
    check_identity,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    write_history,
)
from llamahome.training.data import TokenData
from llamahome.training.digests import config_digest
from llamahome.training.evaluate import evaluate
from llamahome.training.model import (
    Adapter,
    LoadedBase,
    adapter_on,
    check_fits,
    checksum,
    load_base,
)
from llamahome.training.ports import LocalCheckpoint, TrainedAdapter, TrainPorts
from llamahome.training.report import Reporter, finite
from llamahome.training.runtime import (
    Machine,
    Runtime,
    choose_machine,
    configured,
    fingerprint,
)
from llamahome.training.schedule import Plan, checkpoint_due, evaluation_due
from llamahome.training.steps import Stepper

HISTORY_NAME = "history.jsonl"
MAX_SKIPPED_IN_A_ROW = 3


def train(
    spec: JobSpec,
    data: TokenData,
    ports: TrainPorts,
    *,
    runtime: Runtime | None = None,
    base: LoadedBase | None = None,
    resume: Path | None = None,
) -> TrainedAdapter:
    """Train one adapter. ``base`` is used where it serves the spec; else the base is loaded.

    ``resume`` is a checkpoint folder of the same spec and data; a corrupt one is told of, and the
    run starts afresh. The base, warm or loaded here, is as before when this returns or raises;
    ``ports.scratch/adapter`` holds the result.
    Raises InvalidConfig and InvalidData (before any step), InvalidState (a checkpoint of another
    run), TrainingFailed (``nan_loss``, ``out_of_memory``), Stopped (``ports.should_stop``).
    """
    config = parse_training_config(spec.config, source="job")
    data.check()
    snapshot = _load(resume, ports) if resume is not None else None
    # The order of a sum depends on the number of threads: a resumed run keeps its checkpoint's.
    threads = snapshot.fingerprint.get("threads") if snapshot is not None else None
    machine = choose_machine(runtime or Runtime(), config, threads)
    with configured(machine):
        if base is None or not base.serves(spec.base, machine):
            base = load_base(spec.base, machine)
        check_fits(base, data, config)
        try:
            with adapter_on(base, config.lora, config.seed) as adapter:
                training = _Training(spec, config, data, ports, machine, adapter)
                training.start(snapshot)
                training.run()
                folder = training.write()
        except torch.OutOfMemoryError as error:
            raise TrainingFailed(
                f"out of memory: {str(error).splitlines()[0]}", code="out_of_memory",
                remedy="Lower batch_size (and raise gradient_accumulation_steps) or max_length",
            ) from error  # fmt: skip
        unchanged = checksum(base.model) == base.checksum
        return TrainedAdapter(folder, training.report(base_unchanged=unchanged))


def _load(resume: Path, ports: TrainPorts) -> Snapshot | None:
    try:
        return load_checkpoint(resume)
    except CorruptArtifact as error:
        # Training again from the start ends with the same bytes; a broken checkpoint would not.
        ports.event(f"The checkpoint is corrupt, training starts afresh: {error}", level="warn")
        return None


class _Training:
    """One run: what it was given, and where it stands."""

    def __init__(
        self,
        spec: JobSpec,
        config: TrainingConfig,
        data: TokenData,
        ports: TrainPorts,
        machine: Machine,
        adapter: Adapter,
    ) -> None:
        self.spec, self.config, self.data = spec, config, data
        self.ports, self.machine, self.adapter = ports, machine, adapter
        self.plan = Plan.of(config, len(data.training))
        self.reporter = Reporter(ports, self.plan, config)
        self.state = TrainState()
        self.best: Tensors | None = None
        self.saved: tuple[int, int | None] | None = None
        self.stepper = Stepper(adapter, data.training, self.plan, config, machine)
        self.fingerprint = fingerprint(machine, config)
        self.identity = {
            "data": data.digest(),
            "base": spec.base.digest,
            "config": config_digest(config),
        }
        self.moved = False

    def start(self, snapshot: Snapshot | None) -> None:
        if self.machine.note is not None and snapshot is None:
            self.ports.event(self.machine.note, level=self.machine.note_level)
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
        self.adapter.load(snapshot.adapter)
        self.stepper.restore(snapshot.optimizer)
        at_best = self.state.stopping.best_step == self.state.step
        self.best = snapshot.adapter if at_best else snapshot.best
        self.saved = (self.state.step, self.state.evaluated_at)
        self.state.resumed_from.append(self.state.step)

    def run(self) -> None:
        """Until the last step, an early stop, or a reason to stop; at boundaries only."""
        while True:
            evaluated = self._evaluate_if_due()
            if evaluated or checkpoint_due(self.state.step, self.plan, self.config):
                self._checkpoint()
            if self.state.stopping.reason or self.state.step == self.plan.total_steps:
                break
            self._stop_if_asked()
            self._step()
        if self.state.stopping.reason:
            self.reporter.say(f"Stopped early: {self.state.stopping.reason}")

    def _stop_if_asked(self) -> None:
        reason = self.ports.should_stop()
        if reason is None:
            return
        if reason in (StopReason.pause, StopReason.drain):
            self._checkpoint()
        raise Stopped(f"stopped after step {self.state.step}", code=reason.value)

    def _evaluate_if_due(self) -> bool:
        state = self.state
        if not len(self.data.validation) or state.evaluated_at == state.step:
            return False
        if not evaluation_due(state.step, self.plan, self.config):
            return False
        loss = evaluate(
            self.adapter.model, self.data.validation, self.config.batch_size, self.machine,
            self._between_batches,
        )  # fmt: skip
        state.evaluated_at, state.eval_loss = state.step, finite(loss)
        if state.step == 0:
            state.eval_loss_before = finite(loss)
        elif state.stopping.update(loss, state.step, self.config):
            self.best = self.adapter.tensors()
        self.reporter.evaluated(state, loss)
        return state.step > 0

    def _between_batches(self) -> None:
        self.reporter.beat()
        self._stop_if_asked()

    def _checkpoint(self) -> None:
        """Save where the run stands, unless that is saved (or nothing has happened) already."""
        state = self.state
        if state.step == 0 or self.saved == (state.step, state.evaluated_at):
            return
        snapshot = Snapshot(
            state=state,
            adapter=self.adapter.tensors(),
            optimizer=self.stepper.tensors(),
            best=self.best,
            identity=self.identity,
            fingerprint=self.fingerprint,
        )
        root = self.ports.scratch / "checkpoints"
        folder = save_checkpoint(root, snapshot)
        evaluated = state.evaluated_at == state.step
        best = state.stopping.best_step == state.step
        self.ports.checkpoint(
            LocalCheckpoint(folder, state.step, state.eval_loss if evaluated else None, best)
        )
        self.saved = (state.step, state.evaluated_at)
        keep = self.config.checkpointing.save_total_limit
        prune_checkpoints(root, keep, state.stopping.best_step)

    def _step(self) -> None:
        started = time.monotonic()
        taken = self.stepper.take(self.state.step, self.reporter.beat)
        self.state.take(taken)
        if not taken.finite:
            self.reporter.skipped(self.state)
            self._fail_if_hopeless()
        self.reporter.stepped(self.state, taken, time.monotonic() - started)

    def _fail_if_hopeless(self) -> None:
        state = self.state
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"the loss or its gradient was not finite in {state.skipped_in_a_row} steps in a "
                f"row, the last of them step {state.step} of {self.plan.total_steps}",
                code="nan_loss",
                remedy="Lower learning_rate or max_grad_norm; the last good checkpoint is kept",
            )

    def write(self) -> Path:
        """The adapter to publish: the best weights where early stopping watched, else the last."""
        if self.best is not None and self.config.early_stopping.enabled:
            self.adapter.load(self.best)
        self.moved = self.adapter.moved()
        folder = self.ports.scratch / "adapter"
        write_adapter(folder, self.adapter, self.config.lora, self.spec.base.name)
        write_history(folder / HISTORY_NAME, self.state.history)
        return folder

    def report(self, *, base_unchanged: bool) -> TrainingReport:
        state, stopping = self.state, self.state.stopping
        restored = self.best is not None and self.config.early_stopping.enabled
        extra: dict[str, Any] = {
            "step_ledger": state.step_ledger,
            "skipped_steps": state.skipped_steps,
        }
        return TrainingReport(
            steps=state.step,
            epochs=self.plan.epoch_of(state.step),
            seed=self.config.seed,
            eval_loss_before=state.eval_loss_before,
            eval_loss_after=stopping.best_loss if restored else state.eval_loss,
            best_step=stopping.best_step,
            best_eval_loss=stopping.best_loss,
            stopped_early=stopping.reason,
            trained_tokens=state.trained_tokens,
            trainable_parameters=sum(p.numel() for p in self.adapter.parameters.values()),
            base_unchanged=base_unchanged,
            adapter_moved=self.moved,
            resumed_from=tuple(state.resumed_from),
            precision=self.machine.precision,
            mode=self.config.mode,
            metrics=TrainingMetrics(
                train_loss=state.train_loss,
                eval_loss=state.eval_loss,
                learning_rate=state.learning_rate,
                epoch=self.plan.epoch_of(state.step),
                step=state.step,
            ),
            fingerprint={**self.fingerprint, **extra},
        )
