"""How a job begins: what is said of it, and a checkpoint taken up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamahome.training.checkpoints import Snapshot, check_identity

if TYPE_CHECKING:
    from llamahome.training.engine.job import TrainingJob


def begin(job: TrainingJob, snapshot: Snapshot | None) -> None:
    """Start afresh, or from a checkpoint. Raises InvalidState where it is of another run."""
    if snapshot is None:
        _announce(job)
    else:
        _resume(job, snapshot)
    job.reporter.started(job.state, job.config)


def _announce(job: TrainingJob) -> None:
    if job.machine.note is not None:
        job.ports.event(job.machine.note, level=job.machine.note_level)
    if job.warm.why_not is not None:
        job.reporter.say(
            "Rows go through this base one by one, which is slower: " + job.warm.why_not
        )
    if job.warm.why_apart is not None:
        job.reporter.say(
            "Each micro-batch goes through this base by itself, which is slower: "
            + job.warm.why_apart
        )
    if not len(job.data.validation) and job.config.early_stopping.enabled:
        job.reporter.say(
            "No validation rows: no evaluation, and early stopping is off", level="warn"
        )


def _resume(job: TrainingJob, snapshot: Snapshot) -> None:
    check_identity(snapshot.identity, job.identity)
    changed = [
        name for name, value in job.fingerprint.items() if snapshot.fingerprint.get(name) != value
    ]
    if changed:
        job.reporter.say(
            f"Resumed under another {', '.join(changed)}: the result may differ in its last "
            "bits from an undisturbed run",
            level="warn",
        )
    job.state = snapshot.state
    job.slot.load(snapshot.adapter)
    job.optimizer.restore(snapshot.optimizer)
    at_best = job.state.stopping.best_step == job.state.step
    job.best = snapshot.adapter if at_best else snapshot.best
    job.saved_at = (job.state.step, job.state.evaluated_at)
    job.state.resumed_from.append(job.state.step)
