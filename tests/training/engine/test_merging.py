"""``lora.merge``: the base with the adapter in its weights, on a Llama and a GPT-2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import InvalidConfig
from llamahome.schemas import BaseRef, JobSpec
from llamahome.storage.bases import base_digest
from llamahome.training.data import TokenData

pytestmark = pytest.mark.model

MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def save_base(tmp_path: Path) -> Callable[..., Path]:
    """A tiny base in a folder of its own, in shards of at most ``shard`` bytes."""

    def save(family: str, dtype: str = "float32", shard: int | str = "1GB") -> Path:
        import torch
        import transformers

        torch.manual_seed(1)
        shared: dict[str, Any] = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 1}
        if family in ("gpt2", "bare"):
            config: Any = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=2, n_positions=48, initializer_range=0.1, **shared
            )
        else:
            config = transformers.LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=48, initializer_range=0.1,
                tie_word_embeddings=family == "tied", **shared,
            )  # fmt: skip
        folder = tmp_path / "base"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        saved = model.base_model if family == "bare" else model  # as the first GPT-2 was
        saved.save_pretrained(folder, max_shard_size=shard)
        return folder

    return save


@pytest.fixture
def train(
    make_spec: MakeSpec, make_ports: Callable[..., Any], prepared_folder: Path
) -> Callable[..., Any]:
    def do(base: Path, name: str = "job", **changes: Any) -> Any:
        from llamahome.training.loop import train
        from llamahome.training.runtime import Runtime

        lora = {"target_modules": "all-linear", "merge": True, **changes.pop("lora", {})}
        ref = BaseRef(name="test/base", path=str(base), digest=base_digest(base))
        spec = make_spec(lora=lora, **changes).model_copy(update={"base": ref})
        return train(
            spec, TokenData.open(prepared_folder), make_ports(name), runtime=Runtime("cpu", 1)
        )

    return do


@pytest.mark.parametrize(
    ("family", "dtype", "shard", "weights"),
    [
        ("llama", "float32", "1GB", 14),
        ("llama", "bfloat16", 20_000, 14),
        ("tied", "float32", "1GB", 14),
        ("gpt2", "float32", "1GB", 8),
        ("gpt2", "float16", 20_000, 8),
        ("bare", "float32", "1GB", 8),
    ],
)
def test_the_merged_model_loads_alone_and_is_what_peft_would_have_merged(
    save_base: Callable[..., Path],
    train: Callable[..., Any],
    family: str,
    dtype: str,
    shard: int | str,
    weights: int,
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = save_base(family, dtype, shard)
    before = base_digest(base)

    done = train(base, lora={"use_rslora": family == "llama"})

    assert done.report.base_unchanged
    assert base_digest(base) == before
    merged: Any = AutoModelForCausalLM.from_pretrained(done.folder / "merged")
    assert str(merged.dtype) == f"torch.{dtype}"
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), done.folder
    )
    theirs = adapted.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert theirs.keys() == ours.keys()
    changed = 0
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.to(ours[name].dtype), msg=name)
        changed += not torch.equal(ours[name], plain[name])
    assert changed == weights
    found = done.report.proofs["merge"]
    assert (found["rows"], found["weights"], found["dtype"]) == (2, weights, dtype)
    assert found["argmax_agreement"] > (0.99 if dtype == "float32" else 0.9)
    assert found["max_logit_gap"] < (1e-4 if dtype == "float32" else 0.1)


def test_the_check_finds_a_weight_that_is_not_what_it_should_be(
    save_base: Callable[..., Path], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of 14 is written without its update."""
    from llamahome.training import merged

    real = merged._added

    def forgetful(weight: Any, a: Any, b: Any, scale: float, layer: Any) -> Any:
        wrong = layer.name.endswith("layers.1.mlp.down_proj")
        return weight if wrong else real(weight, a, b, scale, layer)

    base = save_base("llama")
    right = train(base, "right").report.proofs["merge"]["max_logit_gap"]
    monkeypatch.setattr(merged, "_added", forgetful)
    wrong = train(base, "wrong").report.proofs["merge"]["max_logit_gap"]
    assert wrong > 100 * right


def test_a_base_whose_files_hold_its_weights_otherwise_is_refused(
    save_base: Callable[..., Path],
) -> None:
    from llamahome.training.merged import Layer, plan_merge

    base = save_base("llama")
    path = base / "config.json"
    config = json.loads(path.read_text())
    with pytest.raises(InvalidConfig, match=r"no model\.layers\.0\.qkv\.weight"):
        plan_merge(base, [Layer("model.layers.0.qkv", (96, 32), False)], "model")
    with pytest.raises(InvalidConfig, match=r"as F32 \[32, 32\].* as \[96, 32\]"):
        plan_merge(base, [Layer("model.layers.0.self_attn.q_proj", (96, 32), False)], "model")
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InvalidConfig, match="quantised"):
        plan_merge(base, [], "model")


def test_markers_and_merge_exclude_each_other(make_spec: MakeSpec) -> None:
    with pytest.raises(InvalidConfig, match=r"lora\.merge cannot be had with template: markers"):
        make_spec(template="markers", lora={"merge": True})


def test_other_jobs_train_on_while_one_is_merged_and_their_bytes_are_the_same(
    make_bench: Callable[..., Any],
) -> None:
    from support.engines import file_bytes

    bench = make_bench()
    other = {"seed": 5, "epochs": 6}
    alone = bench.run({"other": other})
    both = bench.run({"merged": {"epochs": 1, "lora": {"merge": True}}, "other": other})
    assert (both["merged"].folder / "merged" / "config.json").is_file()
    assert file_bytes(both["other"]) == file_bytes(alone["other"])


def test_a_job_has_not_ended_before_nothing_of_its_merge_is_written_any_more(
    make_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading
    import time

    from llamahome.errors import Stopped
    from llamahome.schemas import StopReason
    from llamahome.training import merged

    added, begun, told, written = merged._added, threading.Event(), threading.Event(), list[bool]()

    def slow(*values: Any) -> Any:
        """A weight that takes until some time after the job was told to stop."""
        begun.set()
        told.wait(20)
        time.sleep(0.3)
        written.append(True)
        return added(*values)

    monkeypatch.setattr(merged, "_added", slow)
    bench, ended = make_bench(), dict[str, Any]()
    engine = bench.engine()
    ports = bench.admit(engine, "a", ended, epochs=1, lora={"merge": True})
    while not begun.is_set():
        engine.tick(wait=False)  # a weight in hand wakes nobody

    def cancelled() -> StopReason:
        told.set()
        return StopReason.cancel

    ports.should_stop = cancelled
    while engine.busy:
        engine.tick(wait=False)

    assert isinstance(ended["a"], Stopped)
    assert written == [True], "the weight in hand was finished, and no other begun"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("merge")]
    engine.close()


def test_a_merge_is_stopped_within_a_large_file_too(
    save_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.errors import Stopped
    from llamahome.training import merged

    monkeypatch.setattr(merged, "_COPIED_BYTES", 1000)
    base = save_base("llama")
    beats: list[None] = []
    with pytest.raises(Stopped):
        merged.write_merged(
            merged.plan_merge(base, [], "model"), tmp_path / "merged", {}, 1.0,
            beat=lambda: beats.append(None), stopped=lambda: len(beats) == 3,
        )  # fmt: skip

    assert (tmp_path / "merged" / "model.safetensors").stat().st_size == 3000
