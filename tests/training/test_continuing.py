"""Training that goes on from an earlier adapter: of this project, or saved by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.config import Settings
from llamahome.conversations.tokens import TokenRow, TokenRows, read_token_rows, write_token_rows
from llamahome.errors import CorruptArtifact, InvalidConfig, InvalidState
from llamahome.schemas import ArtifactRef, JobReport, JobSpec, StageTask
from llamahome.training import make_stage, shutdown_engine
from llamahome.training.data import TokenData

pytestmark = pytest.mark.model

WEIGHTS = "adapter_model.safetensors"
MakeSpec = Callable[..., JobSpec]
MakePorts = Callable[..., Any]
REF = ArtifactRef(digest="d" * 64, path="models/earlier", bytes=1)


@pytest.fixture
def train(make_spec: MakeSpec, make_ports: MakePorts, prepared_folder: Path) -> Callable[..., Any]:
    """Train under a name; ``adapter`` is the folder to go on from."""

    def do(
        name: str, adapter: Path | None = None, resume: Path | None = None, **changes: Any
    ) -> Any:
        from llamahome.training.loop import train
        from llamahome.training.runtime import Runtime

        spec = make_spec(**changes)
        if adapter is not None:
            spec = spec.model_copy(update={"adapter": REF, "adapter_name": "earlier"})
        return train(
            spec, TokenData.open(prepared_folder), make_ports(name), runtime=Runtime("cpu", 1),
            adapter=adapter, resume=resume,
        )  # fmt: skip

    return do


@pytest.fixture
def earlier(train: Callable[..., Any]) -> Any:
    return train("earlier")


def test_continuing_begins_with_the_loss_at_which_the_earlier_training_ended(
    train: Callable[..., Any], earlier: Any
) -> None:
    again = train("again", earlier.folder)

    before, after = earlier.report, again.report
    assert after.eval_loss_before == pytest.approx(before.eval_loss_after, abs=1e-6)
    assert after.eval_loss_after < after.eval_loss_before < before.eval_loss_before
    assert after.adapter_moved
    assert after.proofs["first_step_moved"]


def test_continuing_without_learning_gives_the_same_bytes_and_says_that_nothing_moved(
    train: Callable[..., Any], earlier: Any
) -> None:
    again = train("again", earlier.folder, learning_rate=1e-300, weight_decay=0.0)

    assert (again.folder / WEIGHTS).read_bytes() == (earlier.folder / WEIGHTS).read_bytes()
    assert not again.report.adapter_moved


def test_a_continued_job_resumes_from_its_own_checkpoint_and_from_no_other_jobs(
    train: Callable[..., Any], make_ports: MakePorts, earlier: Any, tmp_path: Path
) -> None:
    whole = train("whole", earlier.folder)
    points = sorted((tmp_path / "ports" / "whole" / "store").glob("checkpoint-*"))

    resumed = train("resumed", earlier.folder, resume=points[0])

    assert resumed.report.resumed_from == (3,)
    assert (resumed.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()
    with pytest.raises(InvalidState, match="made with another adapter"):
        train("plain", resume=points[0])


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ({"r": 8}, r"lora\.r: is 8, .* trained with 4"),
        ({"alpha": 16}, r"lora\.alpha: is 16\.0, .* trained with 8\.0"),
        ({"use_rslora": True}, r"lora\.use_rslora: is True, .* trained with False"),
        ({"target_modules": ["q_proj"]}, r"is \['q_proj'\], .* with \['q_proj', 'v_proj'\]"),
        ({"target_modules": "all-linear"}, "lacks 20 of 28 weights"),
    ],
)
def test_a_lora_of_another_meaning_is_refused_naming_both(
    train: Callable[..., Any], earlier: Any, lora: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidConfig, match=text):
        train("other", earlier.folder, lora=lora)


def test_an_adapter_of_another_base_is_refused(
    train: Callable[..., Any], earlier: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(earlier.folder / WEIGHTS)
    first, second, *_ = sorted(tensors)
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes(
        (earlier.folder / "adapter_config.json").read_bytes()
    )
    save_file({**tensors, first: tensors[first][:, :7].contiguous()}, other / WEIGHTS)
    with pytest.raises(InvalidConfig, match=r"shape \[4, 7\], and the job's is \[4, 32\]"):
        train("wide", other)
    save_file({**tensors, "more": tensors[first].clone()}, other / WEIGHTS)
    with pytest.raises(InvalidConfig, match="that this job has not, the first is more"):
        train("more", other)
    save_file({**tensors, second: tensors[second] * float("nan")}, other / WEIGHTS)
    with pytest.raises(InvalidConfig, match="not finite"):
        train("nan", other)
    (other / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(CorruptArtifact, match=WEIGHTS):
        train("corrupt", other)
    (other / WEIGHTS).unlink()
    with pytest.raises(InvalidConfig, match="pickled weights are never loaded"):
        train("missing", other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_saved_by_peft_is_continued_and_peft_loads_the_result(
    train: Callable[..., Any], base_folder: Path, tmp_path: Path, dtype: str
) -> None:
    """The gap between PEFT's own loss and ours at the start is that of two ways to add up."""
    import peft
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "peft")

    kept = train("kept", tmp_path / "peft", learning_rate=1e-300, weight_decay=0.0)
    moved = train("moved", tmp_path / "peft")

    theirs = load_file(tmp_path / "peft" / WEIGHTS)
    ours = load_file(kept.folder / WEIGHTS)
    assert {name: value.float() for name, value in theirs.items()}.keys() == ours.keys()
    assert all(torch.equal(theirs[name].float(), ours[name]) for name in ours)
    config = json.loads((moved.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder), moved.folder
    )
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    trained = load_file(moved.folder / WEIGHTS)
    assert all(torch.equal(state[name], trained[name]) for name in trained)
    assert moved.report.eval_loss_before == kept.report.eval_loss_before
    assert moved.report.eval_loss_after < moved.report.eval_loss_before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"peft_type": "IA3"}, "is of type 'IA3'"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"use_dora": True}, "has use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base"),
        ({"target_modules": ".*q_proj"}, "no list of names"),
        ({"r": None}, r"lora\.r"),
    ],
)
def test_an_adapter_that_means_more_than_lora_is_refused(
    train: Callable[..., Any], earlier: Any, change: dict[str, Any], text: str
) -> None:
    path = earlier.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidConfig, match=text):
        train("other", earlier.folder)


def test_the_rows_of_added_tokens_are_gone_on_from_too(
    make_spec: MakeSpec, make_ports: MakePorts, prepared_folder: Path, tmp_path: Path
) -> None:
    """Every row ends with a token that the base has not."""
    from llamahome.training.loop import train
    from llamahome.training.runtime import Runtime

    def marked(side: str, mark: int) -> TokenRows:
        rows = read_token_rows(prepared_folder / f"{side}.safetensors")
        ended = []
        for index in range(len(rows)):
            ids, trained = rows.row(index)
            ended.append(TokenRow(np.append(ids, np.int32(mark)), np.append(trained, True), 0, 1))
        write_token_rows(tmp_path / f"{side}-{mark}", ended)
        return read_token_rows(tmp_path / f"{side}-{mark}")

    def run(name: str, adapter: Path | None = None, mark: int = 64, **changes: Any) -> Any:
        data = TokenData(marked("training", mark), marked("validation", mark), added=(mark,))
        spec = make_spec(**{"template": "markers", **changes})
        return train(
            spec, data, make_ports(name), runtime=Runtime("cpu", 1), adapter=adapter
        )  # fmt: skip

    first = run("first")
    again = run("again", first.folder)
    assert again.report.eval_loss_before == first.report.eval_loss_after
    with pytest.raises(InvalidConfig, match="template: is 'auto', but .* trained with 'markers'"):
        run("auto", first.folder, template="auto")
    with pytest.raises(InvalidConfig, match=r"adds the tokens \[64\], and the job's data \[63\]"):
        run("other", first.folder, mark=63)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    yield Settings(scratch=tmp_path_factory.mktemp("engine"), threads=1, device="cpu")
    shutdown_engine()


def test_the_stage_goes_on_from_a_published_adapter_and_says_so(
    settings: Settings,
    make_task: Callable[..., StageTask],
    make_ports: MakePorts,
) -> None:
    stage = make_stage(settings)
    first = stage(make_task(), make_ports("first"))
    assert first.artifact is not None
    task = make_task(lora={"merge": True})
    update = {"adapter": first.artifact, "adapter_name": "ft:base:t::1"}
    continued = task.model_copy(update={"spec": task.spec.model_copy(update=update)})

    second = stage(continued, make_ports("second"))

    assert second.summary["eval_loss_before"] == first.summary["eval_loss_after"]
    assert second.artifact is not None
    folder = Path(second.artifact.path)
    report = JobReport.model_validate_json((folder / "report.json").read_text())
    assert report.lineage["adapter"] == first.artifact.digest
    assert report.training.proofs["merge"]["argmax_agreement"] == 1.0
    card = (folder / "README.md").read_text()
    assert f"- Continued from: ft:base:t::1 (digest {first.artifact.digest[:12]})" in card
    assert "- `merged/` is the base with the adapter in its weights (float32)" in card
    assert sorted(path.name for path in (folder / "merged").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_what_the_engine_refuses_ends_the_job_as_the_users_error(
    settings: Settings, make_task: Callable[..., StageTask], make_ports: MakePorts, earlier: Any
) -> None:
    task = make_task(lora={"r": 8})
    ref = ArtifactRef(digest="d" * 64, path=str(earlier.folder), bytes=1)
    spec = task.spec.model_copy(update={"adapter": ref, "adapter_name": "ft:base:t::1"})
    with pytest.raises(InvalidConfig, match="is 8, but the adapter 'ft:base:t::1' was trained"):
        make_stage(settings)(task.model_copy(update={"spec": spec}), make_ports("job"))


def test_the_adapters_config_has_what_peft_and_vllm_read_and_no_more(earlier: Any) -> None:
    """BEHAVIOUR 66: vLLM's file-system resolver asks for peft_type and for the base by the name it
    is served under; its loader for r, lora_alpha and target_modules, and that modules_to_save be
    empty."""
    import peft

    config = json.loads((earlier.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "test/base"
    assert config.keys() == {
        "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "target_modules",
        "task_type", "use_dora", "use_rslora",
    }  # fmt: skip
    assert isinstance(config["lora_alpha"], int)
    read = peft.LoraConfig.from_pretrained(earlier.folder)
    usual = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path="test/base",
    )  # fmt: skip
    assert read.to_dict() == usual.to_dict()
