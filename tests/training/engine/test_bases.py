"""Architectures: packed where the probe at the load proves it right, row by row elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.schemas import BaseRef
from llamahome.storage.bases import base_digest
from support.engines import Bench, file_bytes

pytestmark = pytest.mark.model

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 48, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.1,
}  # fmt: skip
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with grouped heads": ("LlamaConfig", SMALL | {"num_key_value_heads": 2}),
    "llama with tied weights": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "mistral with a window shorter than the rows": (
        "MistralConfig", SMALL | {"num_key_value_heads": 2, "sliding_window": 6, "head_dim": 8},
    ),
    "qwen2": ("Qwen2Config", SMALL | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
    "phi3 with one matrix for q, k and v": ("Phi3Config", SMALL | {"num_key_value_heads": 2}),
    "gpt2 with its weights the other way round": ("GPT2Config", GPT2),
}  # fmt: skip
MOE: dict[str, Any] = SMALL | {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "moe_intermediate_size": 96, "num_experts": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1,
}  # fmt: skip
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", MOE),
    "qwen3 with experts": ("Qwen3MoeConfig", MOE),
}
ROW_BY_ROW: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2 with soft caps": (
        "Gemma2Config",
        SMALL | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "phi3 whose frequencies depend on the longest row": (
        "Phi3Config",
        SMALL | {
            "num_key_value_heads": 2, "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4, "original_max_position_embeddings": 12,
            },
        },
    ),
    "gpt neo, whose attention cannot be replaced": (
        "GPTNeoConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global"], 2]], "max_position_embeddings": 48,
         "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.1},
    ),
    "falcon, which adds to a layer's output in place": (
        "FalconConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 48, "initializer_range": 0.1, "bos_token_id": None,
         "eos_token_id": 1},
    ),
    "bloom with alibi": (
        "BloomConfig",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    ),
}  # fmt: skip


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[[str, dict[str, Any]], BaseRef]:
    def make(config_name: str, settings: dict[str, Any]) -> BaseRef:
        import torch
        import transformers

        torch.manual_seed(1)
        config = getattr(transformers, config_name)(**settings)
        folder = tmp_path / config_name
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return BaseRef(name="test/base", path=str(folder), digest=base_digest(folder))

    return make


def on(bench: Bench, base: BaseRef) -> Bench:
    make = bench.spec
    bench.spec = lambda **settings: make(**settings).model_copy(update={"base": base})
    return bench


@pytest.mark.parametrize("name", [*PACKED, *APART, *ROW_BY_ROW])
def test_loss_and_gradients_are_those_of_transformers_with_peft(
    bench: Bench, make_base: Callable[..., BaseRef], name: str
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamahome.config import parse_training_config
    from llamahome.training.engine.passes import make_unit

    base = make_base(*(PACKED | APART | ROW_BY_ROW)[name])
    on(bench, base)
    lora = {"r": 4, "alpha": 8, "dropout": 0, "target_modules": "all-linear"}
    config = parse_training_config(bench.spec(lora=lora).config, source="test")
    engine = bench.engine()
    packed, why_not = engine.warm.packed, engine.warm.why_not
    apart = engine.warm.why_apart is not None
    slot = engine.warm.slot_for(config)
    with torch.no_grad():
        slot.weights.normal_(std=0.1, generator=torch.Generator().manual_seed(9))
    start, modules = slot.tensors(), list(slot.target_modules)
    rows = bench.data.training
    unit = make_unit(slot, rows, [0, 1, 2], weight=1.0, learns=True)
    (ours,) = engine.warm.run([unit])
    gradients = slot.named(slot.gradient)
    transposed = engine.warm.transposed
    engine.close()

    assert packed is (name not in ROW_BY_ROW), why_not
    assert apart is (name in APART)
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.path),
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=modules,
            fan_in_fan_out=transposed,
        ),
    )  # fmt: skip
    reference.eval()  # a base's own dropout is off here
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert named.keys() == start.keys()
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(start[key])
    theirs = 0.0
    for sample in (0, 1, 2):
        ids, trained = rows.row(sample)
        values = torch.from_numpy(ids.astype(np.int64))[None]
        logits = reference(input_ids=values).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, values[0, 1:], reduction="none")
        loss = losses[torch.from_numpy(trained[1:].copy())].sum()
        loss.backward()
        theirs += float(loss.detach())

    assert ours.summed == pytest.approx(theirs, rel=1e-5)
    for key, parameter in named.items():
        assert parameter.grad is not None
        norm = parameter.grad.norm()
        assert float((gradients[key] - parameter.grad).norm() / norm) <= 1e-4, key


@pytest.mark.parametrize("name", ["gemma2 with soft caps", "qwen3", *APART])
def test_jobs_together_have_the_bytes_of_each_alone_on_any_base(
    bench: Bench, make_base: Callable[..., BaseRef], name: str
) -> None:
    on(bench, make_base(*(PACKED | APART | ROW_BY_ROW)[name]))
    jobs = {
        "a": {"seed": 1},
        "b": {"seed": 2, "batch_size": 3, "lora": {"r": 6}},
        "c": {"seed": 3, "batch_size": 4},
    }

    together = bench.run(jobs)

    for job, settings in jobs.items():
        assert file_bytes(together[job]) == file_bytes(bench.run({job: settings})[job]), job


def test_a_job_on_a_base_that_goes_row_by_row_is_told_why(
    bench: Bench, make_base: Callable[..., BaseRef]
) -> None:
    on(bench, make_base(*ROW_BY_ROW["gemma2 with soft caps"]))
    engine = bench.engine()
    ended: dict[str, Any] = {}
    ports = bench.admit(engine, "a", ended)
    engine.run()
    engine.close()

    (said,) = [message for message in ports.messages() if "one by one" in message]
    assert "softcap" in said
    assert ended["a"].report.proofs["isolation"]["packed"] is False


@pytest.mark.parametrize("name", APART)
def test_micro_batches_of_several_jobs_never_share_a_pass_through_experts_and_jobs_are_told(
    bench: Bench, make_base: Callable[..., BaseRef], name: str
) -> None:
    on(bench, make_base(*APART[name]))
    engine = bench.engine()
    ended: dict[str, Any] = {}
    passes, run = [], engine.warm.run

    def seen(units: Any) -> Any:
        passes.append(len(units))
        return run(units)

    engine.warm.run = seen  # type: ignore[method-assign]
    ports = [bench.admit(engine, name, ended, seed=seed) for seed, name in enumerate("ab")]
    engine.run()
    engine.close()

    assert set(passes) == {1}
    for each in ports:
        (said,) = [message for message in each.messages() if "by itself" in message]
        assert "experts" in said
    isolation = ended["a"].report.proofs["isolation"]
    assert (isolation["packed"], isolation["max_logit_gap"]) == (False, 0.0)


def test_a_base_whose_rows_change_a_bit_with_their_company_is_found_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.training.engine.warm import WarmBase

    logits = WarmBase.logits

    def company(self: WarmBase, units: Any) -> Any:
        return [each + 1e-6 * len(units) for each in logits(self, units)]

    monkeypatch.setattr(WarmBase, "logits", company)
    engine = bench.engine()
    engine.close()

    assert engine.warm.packed
    assert "last bits" in str(engine.warm.why_apart)


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, IndexError, AssertionError])
def test_whatever_the_trial_of_packed_rows_raises_they_go_one_by_one_and_the_reason_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    from llamahome.training.engine import attention
    from support.engines import largest_gap

    expected = bench.run({"a": {"seed": 1}})["a"]

    def fail(*_: Any, **__: Any) -> None:
        raise kind("a shape of its own")

    monkeypatch.setattr(attention, "attend", fail)
    engine = bench.engine()
    ended: dict[str, Any] = {}
    ports = bench.admit(engine, "a", ended, seed=1)
    engine.run()
    engine.close()

    (said,) = [message for message in ports.messages() if "one by one" in message]
    assert kind.__name__ in said
    assert "a shape of its own" in said
    assert largest_gap(ended["a"], expected) < 1e-4


def test_a_trial_without_memory_is_not_held_against_the_base(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from llamahome.training.engine import attention

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(attention, "attend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        bench.engine()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_that_is_five_percent_off_is_found_out(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from llamahome.training.engine import warm

    bench, head = make_bench(precision), warm.Head
    engine = bench.engine()
    engine.close()
    assert engine.warm.packed, engine.warm.why_not

    monkeypatch.setattr(warm, "Head", lambda weight, bias: head(weight * 1.05, bias))
    engine = bench.engine()
    engine.close()

    assert not engine.warm.packed
    assert "not the head's alone" in str(engine.warm.why_not)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_that_scales_its_logits_is_found_out_by_them_too(
    make_bench: Callable[..., Bench],
    make_base: Callable[..., BaseRef],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    """Granite divides them; its config's word for that is not looked at here."""
    from llamahome.training.engine import warm

    granite = SMALL | {"num_key_value_heads": 2, "logits_scaling": 0.95}
    bench = on(make_bench(precision), make_base("GraniteConfig", granite))
    monkeypatch.setattr(warm, "unlike_shorter", lambda config: None)
    engine = bench.engine()
    engine.close()

    assert "not the head's alone" in str(engine.warm.why_not)


def test_the_base_is_left_as_it_came(bench: Bench) -> None:
    import torch

    from llamahome.training.model import checksum, load_base

    base = load_base(bench.spec().base, bench.machine())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
    attention = base.model.config._attn_implementation
    forwards = {name: module.forward for name, module in base.model.named_modules()}
    from llamahome.training.engine.ticks import Engine

    engine = Engine(base, bench.machine())
    engine.close()

    assert base.model.config._attn_implementation == attention
    assert {name: module.forward for name, module in base.model.named_modules()} == forwards
    assert checksum(base.model) == base.checksum
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, before)
