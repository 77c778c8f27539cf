"""The adapter folder made complete: tokenizer, effective config, metrics, report and model card.

No torch here: the supervisor does this, with the reports of the stages before it at hand.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llamahome.errors import CorruptArtifact, OperatorError
from llamahome.schemas import (
    JobReport,
    JobSpec,
    JsonObject,
    PreparationReport,
    RunOutput,
    Stage,
    StageTask,
    Step,
    TrainingReport,
    ValidationReport,
)
from llamahome.training.digests import code_digest, data_digest, json_digest

REPORT_NAME = "report.json"
CONFIG_NAME = "training_config.yaml"
METRICS_NAME = "training_metrics.json"
CARD_NAME = "README.md"
MERGED_FOLDER = "merged"
_PREPARATION_NAME = "preparation.json"
_TOKENIZER_FOLDER = "tokenizer"

Report = TypeVar("Report", bound=BaseModel)


def close_output(task: StageTask, stage: Stage) -> RunOutput:
    """The output of an earlier stage's close step. Raises OperatorError where there is none."""
    outputs = task.outputs_of(stage, Step.close)
    if len(outputs) != 1 or outputs[0].artifact is None:
        raise OperatorError(
            f"training needs the artifact of one {stage} close, and has {len(outputs)} outputs"
        )
    return outputs[0]


def assemble_report(
    task: StageTask, validation: Path, prepared: Path, training: TrainingReport
) -> JobReport:
    """The job's report, from the folders of both close steps. Raises CorruptArtifact."""
    summary = close_output(task, Stage.preprocessing).summary
    spec = task.spec
    return JobReport(
        job_id=task.job_id,
        base=spec.base.name,
        validation=_read(ValidationReport, validation / REPORT_NAME),
        preparation=_read(PreparationReport, prepared / _PREPARATION_NAME),
        training=training,
        lineage={
            "data": data_digest(spec),
            "base": spec.base.digest,
            "tokenizer": str(summary.get("tokenizer_digest", "")),
            "template": str(summary.get("template_digest", "")),
            "config": json_digest(spec.config),
            "code": code_digest(),
        }
        | ({"adapter": spec.adapter.digest} if spec.adapter is not None else {}),
    )


def complete_adapter(folder: Path, spec: JobSpec, prepared: Path, report: JobReport) -> None:
    """Add everything but weights, adapter config and history to ``folder``. Raises OSError."""
    tokenizer = prepared / _TOKENIZER_FOLDER
    merged = folder / MERGED_FOLDER
    for source in sorted(tokenizer.rglob("*")):
        if source.is_file():
            for target in (folder, merged) if merged.is_dir() else (folder,):
                copy = target / source.relative_to(tokenizer)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, copy)
    config = yaml.safe_dump({"training": spec.config}, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
    metrics = report.training.metrics.model_dump_json(indent=2)
    (folder / METRICS_NAME).write_text(metrics + "\n", encoding="utf-8")
    (folder / REPORT_NAME).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(model_card(spec, report), encoding="utf-8")


def summarise(report: JobReport) -> JsonObject:
    """What the ledger keeps of the result."""
    training = report.training
    return {
        "eval_loss_before": training.eval_loss_before,
        "eval_loss_after": training.eval_loss_after,
        "steps": training.steps,
        "trained_tokens": training.trained_tokens,
        "metrics": training.metrics.model_dump(mode="json"),
        "report": report.model_dump(mode="json"),
    }


def model_card(spec: JobSpec, report: JobReport) -> str:
    """Markdown with the front matter that model hubs read."""
    training, preparation = report.training, report.preparation
    lora = spec.config["lora"]
    modules = lora["target_modules"]
    named = modules if isinstance(modules, str) else ", ".join(modules)
    loss = "no validation rows"
    if training.eval_loss_before is not None and training.eval_loss_after is not None:
        loss = f"{training.eval_loss_before:.4f} before, {training.eval_loss_after:.4f} after"
    front = {"base_model": spec.base.name, "library_name": "peft", "tags": ["lora"]}
    title = f"LoRA adapter for {spec.base.name}" + (f": {spec.suffix}" if spec.suffix else "")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {title}",
            "",
            f"- Rows: {preparation.training.rows} trained on, {preparation.validation.rows} for "
            f"validation, of {report.validation.total} read",
            f"- Labelled tokens seen: {training.trained_tokens}",
            f"- Validation loss (nats per labelled token): {loss}",
            f"- Steps: {training.steps} in {training.epochs} epochs, seed {training.seed}",
            f"- LoRA: r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, "
            f"on {named}",
            *_continued(spec),
            *_merged(training),
            f"- Trainable parameters: {training.trainable_parameters}",
            f"- Precision: {training.precision}",
            "",
            f"Load it with PEFT onto the base `{spec.base.name}`. The effective configuration is "
            f"in `{CONFIG_NAME}`, the account of every row and token in `{REPORT_NAME}`.",
            "",
        ]
    )


def _continued(spec: JobSpec) -> list[str]:
    if spec.adapter is None:
        return []
    name = spec.adapter_name or "an earlier adapter"
    return [f"- Continued from: {name} (digest {spec.adapter.digest[:12]})"]


def _merged(training: TrainingReport) -> list[str]:
    found = training.proofs.get("merge")
    if found is None:
        return []
    return [
        f"- `{MERGED_FOLDER}/` is the base with the adapter in its weights ({found['dtype']}): "
        f"the likeliest token agrees at {found['argmax_agreement']:.1%} of {found['places']} "
        f"places, the largest gap of a logit is {found['max_logit_gap']:.3g}"
    ]


def _read(kind: type[Report], path: Path) -> Report:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptArtifact(f"no {kind.__name__}: {error}", file=path.name) from error
