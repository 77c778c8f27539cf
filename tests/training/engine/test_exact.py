"""Jobs that share passes end as if each had been alone: the ladder of proofs, on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.engines import Bench, file_bytes, largest_gap, weights

pytestmark = pytest.mark.model

MIXED: dict[str, dict[str, Any]] = {
    "a": {"seed": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "lora": {"r": 8}},
    "b": {
        "seed": 2, "batch_size": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 0.05,
        "lora": {"r": 16, "dropout": 0.3, "target_modules": "all-linear"},
    },
    "c": {
        "seed": 3, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-2,
        "lr_scheduler": "cosine", "lora": {"r": 4, "dropout": 0.0, "use_rslora": True},
    },
    "d": {
        "seed": 4, "batch_size": 3, "gradient_accumulation_steps": 1, "epochs": 3,
        "lora": {"r": 6, "target_modules": ["o_proj", "down_proj"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_in_fp32_four_jobs_together_have_the_bytes_of_each_alone(
    make_bench: Callable[..., Bench], threads: int
) -> None:
    bench = make_bench("fp32", threads)
    together = bench.run(MIXED)

    for name, settings in MIXED.items():
        alone = bench.run({name: settings})[name]
        assert file_bytes(together[name]) == file_bytes(alone), name
        ledgers = [each.report.fingerprint["step_ledger"] for each in (together[name], alone)]
        assert ledgers[0] == ledgers[1], name


def test_in_fp64_they_differ_by_no_more_than_rounding(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench("fp64")
    together = bench.run(MIXED)

    for name, settings in MIXED.items():
        assert largest_gap(together[name], bench.run({name: settings})[name]) <= 1e-12, name


def test_the_order_of_the_slots_changes_nothing(bench: Bench) -> None:
    expected = {name: file_bytes(end) for name, end in bench.run(MIXED).items()}

    for order in itertools.islice(itertools.permutations(MIXED), 5, 24, 7):
        found = bench.run({name: MIXED[name] for name in order})
        assert {name: file_bytes(end) for name, end in found.items()} == expected, order


def test_jobs_that_join_and_leave_in_between_change_nothing(bench: Bench) -> None:
    alone = file_bytes(bench.run({"b": MIXED["b"]})["b"])
    engine = bench.engine()
    ended: dict[str, Any] = {}
    bench.admit(engine, "b", ended, **MIXED["b"])
    for name in ("a", "c", "d"):
        for _ in range(3):
            engine.tick(wait=True)
        bench.admit(engine, name, ended, **MIXED[name])
    engine.run()
    engine.close()

    assert set(ended) == set(MIXED)
    assert file_bytes(ended["b"]) == alone


def test_a_smaller_or_larger_tick_changes_nothing(bench: Bench) -> None:
    expected = {name: file_bytes(end) for name, end in bench.run(MIXED).items()}

    for tokens in (100, 100_000):
        found = bench.run(MIXED, tick_tokens=tokens)
        assert {name: file_bytes(end) for name, end in found.items()} == expected, tokens


def test_a_slot_that_another_job_had_before_is_as_a_fresh_one(bench: Bench) -> None:
    fresh = file_bytes(bench.run({"a": MIXED["a"]})["a"])
    engine = bench.engine()
    ended: dict[str, Any] = {}
    for name in ("c", "b", "a"):
        bench.admit(engine, name, ended, **MIXED[name])
        engine.run()
    engine.close()

    assert file_bytes(ended["a"]) == fresh


def test_recomputed_layers_change_nothing(bench: Bench) -> None:
    expected = file_bytes(bench.run({"b": MIXED["b"]})["b"])
    engine = bench.engine()
    engine.memory.layers_to_recompute = lambda tokens, most: most  # type: ignore[method-assign]
    ended: dict[str, Any] = {}
    bench.admit(engine, "b", ended, **MIXED["b"])
    engine.run()

    assert engine.warm.recomputation.layers == 2
    engine.close()
    assert file_bytes(ended["b"]) == expected


def test_one_micro_batch_has_the_loss_and_gradients_of_transformers_with_peft(
    bench: Bench, base_folder: Any
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamahome.config import parse_training_config
    from llamahome.training.engine.passes import make_unit

    samples = [0, 3, 5]
    lora = {"r": 4, "alpha": 8, "dropout": 0, "target_modules": "all-linear"}
    config = parse_training_config(bench.spec(lora=lora).config, source="test")
    engine = bench.engine()
    slot = engine.warm.slot_for(config)
    with torch.no_grad():
        # B is zero at the start, and with it the gradient of A.
        slot.weights.normal_(std=0.1, generator=torch.Generator().manual_seed(9))
    start = slot.tensors()
    labels_in_all = sum(int(bench.data.training.row(one)[1][1:].sum()) for one in samples)
    unit = make_unit(slot, bench.data.training, samples, weight=1 / labels_in_all, learns=True)
    (ours,) = engine.warm.run([unit])
    gradients = slot.named(slot.gradient)
    engine.close()

    longest = max(len(bench.data.training.row(one)[0]) for one in samples)
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for at, sample in enumerate(samples):
        row, trained = bench.data.training.row(sample)
        values = torch.from_numpy(row.astype(np.int64))
        ids[at, : len(row)], mask[at, : len(row)] = values, 1
        labels[at, : len(row)] = torch.where(torch.from_numpy(trained.copy()), values, -100)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=modules),
    )
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    theirs = reference(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()

    assert ours.weighted == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert set(named) == set(gradients)
    for name, parameter in named.items():
        assert parameter.grad is not None
        gap = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(gap) <= 1e-6, name


def test_the_layers_backward_is_the_derivative_of_its_forward_with_dropout_in_both(
    bench: Bench,
) -> None:
    """Two jobs in one product, against autograd on the formula written out, in fp64."""
    import torch

    from llamahome.config import parse_training_config
    from llamahome.training.engine.draws import DropKey, keep_mask
    from llamahome.training.engine.passes import make_pass, make_unit

    bench.precision = "fp64"
    engine = bench.engine()
    site = engine.warm.site("model.layers.1.mlp.down_proj")
    generator = torch.Generator().manual_seed(9)
    slots, units = [], []
    for index, dropout in enumerate((0.4, 0.0)):
        lora = {"r": 4 + index, "dropout": dropout, "target_modules": ["down_proj"]}
        config = parse_training_config(bench.spec(lora=lora).config, source="test")
        slots.append(engine.warm.slot_for(config))
        with torch.no_grad():
            slots[-1].weights.normal_(std=0.1, generator=generator)
        drops = DropKey(1, 2, 3)
        rows = bench.data.training
        units.append(make_unit(slots[-1], rows, [index], weight=1.0, learns=True, drops=drops))
    whole = make_pass(units, 16, torch.device("cpu"))
    x = torch.randn(len(whole.ids), 64, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    with engine.warm.board.showing(whole.segments, len(whole.ids)):
        y = site(x)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(upstream)
    ours = [x.grad.clone()] if x.grad is not None else []
    x.grad = None
    expected = x @ site.weight.t()
    leaves = []
    for segment, slot in zip(whole.segments, slots, strict=True):
        pair = slot.pairs[site.shape.name]
        a, b = (each.clone().requires_grad_() for each in (pair.a, pair.b))
        leaves += [a, b]
        ours += [pair.grad_a, pair.grad_b]
        mine = x[segment.start : segment.end]
        if slot.dropout.level:
            mask = keep_mask(
                DropKey(1, 2, 3),
                site.shape.name,
                range(len(mine)),
                len(mine),
                64,
                slot.dropout,
                x.device,
            )
            assert 0.3 < float((~mask).double().mean()) < 0.5
            mine = mine * mask / slot.dropout.keep
        part = torch.zeros_like(expected)
        part[segment.start : segment.end] = slot.scale * (mine @ a.t()) @ b.t()
        expected = expected + part
    theirs = torch.autograd.grad(expected, [x, *leaves], upstream)
    engine.close()

    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_grouped_tier_gives_what_the_loop_gives(
    make_bench: Callable[..., Bench], dtype: str
) -> None:
    """Mixed ranks and targets, dropout, a slot with two units, one pass: losses and gradients."""
    import torch

    from llamahome.config import parse_training_config
    from llamahome.training.engine.draws import DropKey
    from llamahome.training.engine.passes import make_unit

    bench = make_bench(dtype)
    engine = bench.engine()
    slots, units = [], []
    for index, settings in enumerate(MIXED.values()):
        config = parse_training_config(bench.spec(**settings).config, source="test")
        slot = engine.warm.slot_for(config)
        with torch.no_grad():
            slot.weights.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
        slot.refresh()
        slots.append(slot)
        for micro in range(1 + (index == 1)):
            drops = DropKey(index, 0, micro)
            samples = [2 * index, 2 * index + 1]
            rows = bench.data.training
            unit = make_unit(slot, rows, samples, weight=0.1, learns=True, drops=drops)
            units.append(unit)
    found = {}
    for tier in ("loop", "grouped"):
        engine.warm.board.tier = tier  # type: ignore[assignment]
        losses = [each.summed for each in engine.warm.run(units)]
        found[tier] = (losses, [slot.gradient.clone() for slot in slots])
        for slot in slots:
            slot.gradient.zero_()
    engine.close()

    close = 1e-5 if dtype == "fp32" else 0.02
    assert found["grouped"][0] == pytest.approx(found["loop"][0], rel=close)
    for one, other in zip(found["grouped"][1], found["loop"][1], strict=True):
        assert float((one - other).norm() / other.norm()) < close


def test_in_the_grouped_tier_a_nan_stays_in_its_group_and_a_whole_run_learns_the_same(
    bench: Bench,
) -> None:
    import torch

    expected = bench.run(MIXED)
    engine = bench.engine()
    engine.warm.board.tier = "grouped"
    ended: dict[str, Any] = {}
    for name, settings in MIXED.items():
        bench.admit(engine, name, ended, **settings)
    bench.admit(engine, "poison", ended, seed=9, epochs=5)
    poisoned = engine.slots()[-1]
    engine.tick(wait=True)
    with torch.no_grad():
        poisoned.weights.fill_(float("nan"))
    poisoned.refresh()
    engine.run()
    engine.close()

    assert isinstance(ended["poison"], Exception)
    for name in MIXED:
        assert largest_gap(ended[name], expected[name]) < 1e-3, name


def test_a_whole_run_learns_what_a_plain_loop_with_peft_learns(
    bench: Bench, base_folder: Any
) -> None:
    """BEHAVIOUR 68: same start, order, schedule and clipping, no dropout: the same weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamahome.config import parse_training_config
    from llamahome.training.schedule import Plan, learning_rate

    bench.precision = "fp64"
    settings = {"lora": {"dropout": 0}, "early_stopping": {"enabled": False}, "epochs": 3}
    found = weights(bench.run({"a": settings})["a"])
    config = parse_training_config(bench.spec(**settings).config, source="test")
    engine = bench.engine()
    start = engine.warm.slot_for(config).tensors()
    engine.close()

    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.r,
            lora_alpha=int(config.lora.alpha),
            target_modules=list(config.lora.target_modules),
        ),
        autocast_adapter_dtype=False,
    )
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in named.items():
        parameter.data = start[name].clone()
    optimizer = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=config.weight_decay)
    rows = bench.data.training
    plan = Plan.of(config, len(rows))
    for step in range(plan.total_steps):
        samples = [int(one) for window in plan.micro_batches(step) for one in window]
        total = sum(int(rows.row(one)[1][1:].sum()) for one in samples)
        for sample in samples:
            ids, trained = rows.row(sample)
            values = torch.from_numpy(ids.astype(np.int64))[None]
            logits = reference(input_ids=values).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, values[0, 1:], reduction="none")
            (losses[torch.from_numpy(trained[1:].copy())].sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, plan.total_steps, config)
        optimizer.step()
        optimizer.zero_grad()

    assert found.keys() == named.keys()
    for name, parameter in named.items():
        assert float((found[name] - parameter.detach()).abs().max()) < 1e-9, name


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("threads", [1, 2])
def test_with_long_rows_and_full_ticks_the_bytes_are_still_those_of_each_alone(
    make_bench: Callable[..., Bench], make_prepared: Callable[..., Path], tmp_path: Path,
    threads: int,
) -> None:  # fmt: skip
    """Products of up to 4,000 rows, where a library may well cut its work in another way."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamahome.schemas import BaseRef
    from llamahome.storage.bases import base_digest
    from llamahome.training.data import TokenData

    folder = tmp_path / "base"
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000, hidden_size=192, intermediate_size=448, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            bos_token_id=None, eos_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    base = BaseRef(name="test/base", path=str(folder), digest=base_digest(folder))
    bench = make_bench("fp32", threads)
    make = bench.spec
    bench.spec = lambda **settings: make(**settings).model_copy(update={"base": base})
    bench.data = TokenData.open(make_prepared(training=9, validation=2, longest=1000))
    jobs = {name: settings | {"epochs": 1} for name, settings in MIXED.items()}

    together = bench.run(jobs, tick_tokens=4000)

    for name, settings in jobs.items():
        assert file_bytes(together[name]) == file_bytes(bench.run({name: settings})[name]), name
