"""What a job leaves: the adapter to publish, and the report of how it came about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.errors import TrainingFailed
from llamahome.schemas import TrainingMetrics, TrainingReport
from llamahome.training.adapter import write_adapter
from llamahome.training.checkpoints import write_history
from llamahome.training.engine.checks import check_isolation

if TYPE_CHECKING:
    from llamahome.training.engine.job import TrainingJob

HISTORY_NAME = "history.jsonl"


def write_result(job: TrainingJob) -> Path:
    """The adapter to publish: the best weights where early stopping watched, else the last.

    Raises TrainingFailed (``nan_loss``) where they are not finite.
    """
    if job.best is not None and job.config.early_stopping.enabled:
        job.slot.load(job.best)
    if not job.slot.is_finite():
        # Steps are skipped where the loss is not finite; the last one may have overshot before it.
        raise TrainingFailed(
            f"the weights are not finite after step {job.state.step}", code="nan_loss",
            remedy="Lower learning_rate; the last good checkpoint is kept",
        )  # fmt: skip
    job.state.proofs["adapter_moved"] = job.slot.moved()
    job.state.proofs["isolation"] = check_isolation(job.warm, job.slot, job.data.training)
    folder = job.ports.scratch / "adapter"
    write_adapter(folder, job.slot, job.config.lora, job.spec.base.name, job.warm.transposed)
    write_history(folder / HISTORY_NAME, job.state.history)
    return folder


def training_report(job: TrainingJob, *, base_unchanged: bool) -> TrainingReport:
    state, stopping = job.state, job.state.stopping
    restored = job.best is not None and job.config.early_stopping.enabled
    extra: dict[str, Any] = {
        "step_ledger": state.step_ledger,
        "skipped_steps": state.skipped_steps,
    }
    epoch = job.plan.epoch_of(state.place)
    proofs = {key: value for key, value in state.proofs.items() if key != "adapter_moved"}
    return TrainingReport(
        steps=state.step,
        epochs=epoch,
        seed=job.config.seed,
        eval_loss_before=state.eval_loss_before,
        eval_loss_after=stopping.best_loss if restored else state.eval_loss,
        best_step=stopping.best_step,
        best_eval_loss=stopping.best_loss,
        stopped_early=stopping.reason,
        trained_tokens=state.trained_tokens,
        trainable_parameters=job.slot.parameters,
        base_unchanged=base_unchanged,
        adapter_moved=bool(state.proofs["adapter_moved"]),
        resumed_from=tuple(state.resumed_from),
        precision=job.machine.precision,
        mode=job.config.mode,
        metrics=TrainingMetrics(
            train_loss=state.train_loss,
            eval_loss=state.eval_loss,
            learning_rate=state.learning_rate,
            epoch=epoch,
            step=state.step,
        ),
        proofs=proofs,
        fingerprint={**job.fingerprint, **extra},
    )
