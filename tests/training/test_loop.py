from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.conversations.tokens import TokenRow, TokenRows, read_token_rows, write_token_rows
from llamahome.errors import (
    InvalidConfig,
    InvalidData,
    InvalidState,
    NotFound,
    Stopped,
    TrainingFailed,
)
from llamahome.schemas import JobSpec, StopReason
from llamahome.storage.bases import base_digest
from llamahome.training.checkpoints import load_checkpoint
from llamahome.training.data import TokenData
from llamahome.training.ports import TrainedAdapter, TrainPorts

pytestmark = pytest.mark.model

MakeSpec = Callable[..., JobSpec]
MakePorts = Callable[..., Any]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def data(prepared_folder: Path) -> TokenData:
    return TokenData.open(prepared_folder)


def train(spec: JobSpec, data: TokenData, ports: TrainPorts, **keywords: Any) -> TrainedAdapter:
    from llamahome.training.loop import train as real_train
    from llamahome.training.runtime import Runtime

    return real_train(spec, data, ports, runtime=Runtime("cpu", threads=1), **keywords)


def tree(folder: Path) -> dict[str, str]:
    """Every file's digest by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def history(trained: TrainedAdapter) -> list[dict[str, Any]]:
    text = (trained.folder / "history.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_loss_falls_the_adapter_moves_and_the_base_does_not(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 66: only the adapter is trained; the base's checksum stays."""
    trained = train(make_spec(epochs=8, lora={"target_modules": "all-linear"}), data, ports)

    report = trained.report
    assert report.eval_loss_before is not None
    assert report.eval_loss_after is not None
    assert report.eval_loss_after < report.eval_loss_before - 0.5
    assert report.base_unchanged
    assert report.adapter_moved
    assert (report.steps, report.epochs, report.metrics.step) == (24, 8, 24)
    assert report.trained_tokens == 8 * sum(
        int(data.training.row(i)[1][1:].sum()) for i in range(11)
    )


def test_the_events_tell_the_story_and_the_metrics_carry_their_figures(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 69: fp16 on a CPU warns and names fp32."""
    trained = train(make_spec(fp16=True), data, ports)

    said = ports.messages()
    assert said[:3] == [
        "fp16 is not available on a CPU: training in fp32",
        "Fine-tuning job started",
        f"Evaluation before training: {trained.report.eval_loss_before:.4f}",
    ]
    assert ports.messages("warn") == said[:1]
    assert any(message.startswith("Evaluation after epoch 1: ") for message in said)
    steps = [body for _, _, body in ports.events if "train_loss" in body]
    assert [body["step"] for body in steps] == [1, 2, 3, 4, 5, 6]
    assert {"total_steps", "learning_rate", "epoch", "grad_norm", "tokens_per_second"} <= set(
        steps[0]
    )
    assert ports.steps_seen == [0, 1, 2, 3, 4, 5, 6]


def test_history_is_complete_strict_json_and_holds_no_clock(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 75: a line of strict JSON for each logging step."""
    trained = train(make_spec(logging={"steps": 2}), data, ports)

    lines = history(trained)
    assert [line["step"] for line in lines if "train_loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    assert not any("second" in key for line in lines for key in line)


def test_equal_inputs_give_equal_bytes_and_another_seed_others(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    trees = [
        tree(train(make_spec(seed=seed), data, make_ports(name)).folder)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]

    assert trees[0] == trees[1]
    assert trees[0][WEIGHTS] != trees[2][WEIGHTS]


def test_rows_cut_into_other_micro_batches_give_the_same_step(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    """A window of 4 rows: as 1 x 4, 2 x 2 and 4 x 1. A mean of means would differ by percents."""
    from safetensors.torch import load_file

    losses, weights = [], []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        ports = make_ports(str(batch))
        spec = make_spec(
            batch_size=batch, gradient_accumulation_steps=accumulation, epochs=1,
            lora={"dropout": 0},
        )  # fmt: skip
        trained = train(spec, data, ports)
        losses.append([body["train_loss"] for _, _, body in ports.events if "train_loss" in body])
        weights.append(load_file(trained.folder / WEIGHTS))

    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, rtol=1e-2, atol=1e-4, err_msg=name)


def test_early_stopping_ends_the_run_and_the_best_weights_are_the_ones_published(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 71: it stops, says why, and publishes the best weights."""
    from safetensors.torch import load_file

    # At this rate it learns and then breaks what it learned.
    spec = make_spec(
        epochs=40, learning_rate=0.3, lr_scheduler="constant", max_grad_norm=100.0,
        early_stopping={"patience": 2}, checkpointing={"save_total_limit": 1},
    )  # fmt: skip

    trained = train(spec, data, ports)

    report = trained.report
    assert report.stopped_early is not None
    assert report.best_step is not None
    assert report.best_step < report.steps < 120
    assert report.eval_loss_after == report.best_eval_loss
    assert report.metrics.step == report.steps
    best = load_file(ports.kept[report.best_step] / "adapter.safetensors")
    published = load_file(trained.folder / WEIGHTS)
    assert all(bool((published[name] == tensor).all()) for name, tensor in best.items())
    local = sorted(path.name for path in (ports.scratch / "checkpoints").iterdir())
    assert local == [f"checkpoint-{report.best_step:08d}", f"checkpoint-{report.steps:08d}"]


def test_without_validation_rows_there_is_no_evaluation_and_a_warning(
    make_spec: MakeSpec, ports: Any, make_prepared: Callable[..., Path]
) -> None:
    """BEHAVIOUR 58, 75: no evaluation, a warning, and a null eval_loss."""
    folder = make_prepared(training=1, validation=0)

    report = train(make_spec(), TokenData.open(folder), ports).report

    assert (report.steps, report.eval_loss_before, report.eval_loss_after) == (2, None, None)
    assert report.metrics.eval_loss is None
    assert report.adapter_moved
    assert ports.messages("warn") == [
        "No validation rows: no evaluation, and early stopping is off"
    ]


def test_peft_loads_the_result_onto_the_base_and_the_logits_change(
    make_spec: MakeSpec, data: TokenData, ports: Any, base_folder: Path
) -> None:
    """BEHAVIOUR 74: PEFT loads the result."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = train(make_spec(lora={"target_modules": "all-linear"}), data, ports).folder

    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "test/base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "lm_head" not in config["target_modules"]
    assert config["lora_alpha"] == 8
    assert None not in config.values()
    ids = torch.arange(2, 14).unsqueeze(0)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(base_folder)(ids).logits
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_folder), str(folder)
        )
        assert float((model(ids).logits - alone).abs().max()) > 0.1
    saved = {path.read_bytes() for path in folder.iterdir()}
    assert not any(str(ports.scratch).encode() in content for content in saved)


def test_a_module_that_is_not_there_is_refused_with_those_that_are(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 66: a wrong module name lists those there are."""
    spec = make_spec(lora={"target_modules": ["q_proj", "query", "lm_head"]})

    with pytest.raises(InvalidConfig, match="no linear layer 'query'") as caught:
        train(spec, data, ports)

    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    with pytest.raises(InvalidConfig, match="lm_head"):
        train(make_spec(lora={"target_modules": ["lm_head"]}), data, ports)


def test_a_row_longer_than_the_context_is_refused_before_training(
    make_spec: MakeSpec, ports: Any, make_prepared: Callable[..., Path]
) -> None:
    """BEHAVIOUR 53: a row longer than the model's context."""
    folder = make_prepared(training=40, validation=0, longest=96)

    with pytest.raises(InvalidConfig, match="context of 48") as caught:
        train(make_spec(), TokenData.open(folder), ports)

    assert caught.value.place.field == "max_length"


def test_a_token_the_base_does_not_have_is_refused(
    make_spec: MakeSpec, data: TokenData, ports: Any, tmp_path: Path
) -> None:
    """BEHAVIOUR 54: ids are below the vocabulary's size."""
    foreign = rows(tmp_path, TokenRow(np.array([5, 64], np.int32), np.array([0, 1], np.bool_)))

    with pytest.raises(InvalidData, match="token id 64"):
        train(make_spec(), TokenData(foreign, data.validation), ports)


def rows(folder: Path, *given: TokenRow) -> TokenRows:
    path = folder / "rows.safetensors"
    write_token_rows(path, given)
    return read_token_rows(path)


class Poisoned:
    """Makes an adapter NaN-prone: the base's embedding of some steps' rows is NaN."""

    def __init__(self, ports: Any, base: Any, at: set[int]) -> None:
        weight = base.model.model.embed_tokens.weight
        clean = weight.detach().clone()

        def poison(done: int) -> None:
            weight.data.copy_(clean)
            if done in at:
                weight.data.fill_(float("nan"))

        ports.on_progress = poison


def loaded(spec: JobSpec) -> Any:
    from llamahome.config import parse_training_config
    from llamahome.training.model import load_base
    from llamahome.training.runtime import Runtime, choose_machine

    config = parse_training_config(spec.config, source="test")
    return load_base(spec.base, choose_machine(Runtime("cpu", 1), config))


def test_steps_that_are_not_finite_are_skipped_and_counted(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 75: null and a flag, on every such step, whatever is logged otherwise."""
    spec = make_spec(logging={"steps": 4})
    base = loaded(spec)
    Poisoned(ports, base, {1, 3, 4})

    trained = train(spec, data, ports, base=base)

    assert trained.report.fingerprint["skipped_steps"] == 3
    assert trained.report.steps == 6
    assert trained.report.adapter_moved  # and finite
    assert len(ports.messages("warn")) == 3
    lines = history(trained)
    assert [line["step"] for line in lines if line.get("train_loss", 0) is None] == [2, 4, 5]
    # After step 3 the evaluation too meets the poison.
    flagged = [line["step"] for line in lines if line.get("not_finite")]
    assert flagged == [2, 3, 4, 5]
    assert [line["step"] for line in lines if line.get("eval_loss", 0) is None] == [3]
    assert [line["step"] for line in lines if "train_loss" in line] == [2, 4, 5, 6]


def test_three_steps_in_a_row_that_are_not_finite_fail_the_job_and_keep_the_checkpoint(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    """BEHAVIOUR 76: NaN is a typed failure; the good checkpoint stays."""
    import torch

    spec = make_spec()
    base = loaded(spec)
    Poisoned(ports, base, {3, 4, 5})

    with pytest.raises(TrainingFailed, match="3 steps in a row") as caught:
        train(spec, data, ports, base=base)

    assert caught.value.code == "nan_loss"
    assert list(ports.kept) == [3]
    kept = load_checkpoint(ports.kept[3])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.adapter.values())


def test_a_checkpoint_of_another_config_is_refused(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    """BEHAVIOUR 73: a checkpoint of other settings."""
    first = make_ports("a", {2: StopReason.drain})
    with pytest.raises(Stopped):
        train(make_spec(), data, first)

    changed = make_spec(learning_rate=0.5)
    with pytest.raises(InvalidState, match="another config") as caught:
        train(changed, data, make_ports("b"), resume=first.kept[2])

    assert caught.value.code == "checkpoint_mismatch"


def test_cancel_ends_at_the_next_boundary_and_saves_nothing(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    ports = make_ports("a", {2: StopReason.cancel})

    with pytest.raises(Stopped) as caught:
        train(make_spec(), data, ports)

    assert caught.value.code == "cancel"
    assert ports.kept == {}
    assert ports.steps_seen[-1] == 2


def test_a_warm_base_serves_one_job_after_another_exactly_as_a_fresh_one(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    specs = [make_spec(seed=1), make_spec(seed=2, lora={"r": 8, "target_modules": "all-linear"})]
    fresh = [
        tree(train(spec, data, make_ports(f"fresh{i}")).folder) for i, spec in enumerate(specs)
    ]
    base = loaded(specs[0])
    before = set(base.model.state_dict())
    stopped = make_ports("stopped", {1: StopReason.cancel})
    with pytest.raises(Stopped):
        train(specs[1], data, stopped, base=base)

    warm = [
        tree(train(spec, data, make_ports(f"warm{i}"), base=base).folder)
        for i, spec in enumerate(specs)
    ]

    assert warm == fresh
    assert set(base.model.state_dict()) == before
    assert not hasattr(base.model, "peft_config")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_rank_stabilised_scaling_is_written_and_used(
    make_spec: MakeSpec, data: TokenData, make_ports: MakePorts
) -> None:
    plain = train(make_spec(), data, make_ports("a"))
    stabilised = train(make_spec(lora={"use_rslora": True}), data, make_ports("b"))

    assert json.loads((stabilised.folder / "adapter_config.json").read_text())["use_rslora"] is True
    assert tree(plain.folder)[WEIGHTS] != tree(stabilised.folder)[WEIGHTS]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "brings code of its own"),
        ({"num_hidden_layers": 3}, "lacks 9 weights"),
        ({"model_type": "no-such-type"}, "cannot be loaded"),
    ],
)
def test_a_base_that_is_not_what_it_seems_is_refused(
    make_spec: MakeSpec,
    data: TokenData,
    ports: Any,
    base_folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    why: str,
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    spec = make_spec()
    changed = {"path": str(folder), "digest": base_digest(folder)}
    other = spec.model_copy(update={"base": spec.base.model_copy(update=changed)})

    with pytest.raises(InvalidConfig, match=why) as caught:
        train(other, data, ports)

    assert caught.value.code == "invalid_base"


def test_a_base_with_pickled_weights_or_none_is_refused(
    make_spec: MakeSpec, data: TokenData, ports: Any, tmp_path: Path
) -> None:
    spec = make_spec()
    other = spec.model_copy(update={"base": spec.base.model_copy(update={"path": str(tmp_path)})})

    with pytest.raises(NotFound, match="no config.json"):
        train(other, data, ports)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InvalidConfig, match="no safetensors weights"):
        train(other, data, ports)


def test_exact_mode_is_told_and_torch_is_left_as_it_was(
    make_spec: MakeSpec, data: TokenData, ports: Any
) -> None:
    import torch

    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    threads = torch.get_num_threads()

    report = train(make_spec(mode="exact"), data, ports).report

    assert (report.mode, report.fingerprint["deterministic"]) == ("exact", True)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_a_base_whose_files_changed_since_the_job_was_accepted_is_refused(
    make_spec: MakeSpec, data: TokenData, ports: Any, base_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    spec = make_spec()
    moved = spec.model_copy(update={"base": spec.base.model_copy(update={"path": str(folder)})})
    with pytest.raises(InvalidState, match="the job was accepted with"):
        train(moved, data, ports)
