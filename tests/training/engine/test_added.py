"""Tokens added to the base: their rows learn, are saved as PEFT has them, and touch nobody else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamahome.conversations.tokens import TokenRow, TokenRows, read_token_rows, write_token_rows
from llamahome.errors import InvalidConfig
from llamahome.schemas import BaseRef
from llamahome.storage.bases import base_digest
from llamahome.training.data import TokenData
from support.engines import Bench, file_bytes, weights

pytestmark = pytest.mark.model

VOCABULARY = 64


def with_marks(rows: TokenRows, path: Path, marks: tuple[int, ...]) -> TokenRows:
    """The same rows, each with a mark before its answer and one, trained, at its end."""
    marked = []
    for index in range(len(rows)):
        ids, trained = rows.row(index)
        answer = int(np.argmax(trained))
        body = [*ids[:answer], marks[0], *ids[answer:], marks[1]]
        labels = [*trained[:answer], False, *trained[answer:], True]
        marked.append(TokenRow(np.array(body, np.int32), np.array(labels, np.bool_), 0, index + 1))
    write_token_rows(path, marked)
    return read_token_rows(path)


def marked_data(bench: Bench, folder: Path, marks: tuple[int, ...]) -> TokenData:
    folder.mkdir()
    return TokenData(
        with_marks(bench.data.training, folder / "a", marks),
        with_marks(bench.data.validation, folder / "b", marks),
        added=marks,
    )


@pytest.fixture
def tied_base(tmp_path: Path) -> BaseRef:
    """A base with tied weights whose matrix has two rows to spare, 62 and 63."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tied"
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=48, bos_token_id=None, eos_token_id=1,
            initializer_range=0.1, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    return BaseRef(name="test/tied", path=str(folder), digest=base_digest(folder))


@pytest.mark.parametrize("marks", [(64, 65), (62, 63), (63, 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_adapter_has_in_peft_the_logits_it_had_here(
    bench: Bench, tmp_path: Path, tied_base: BaseRef, marks: tuple[int, int], tied: bool
) -> None:
    """BEHAVIOUR 48, 67: beyond the base's rows, within them, and both; what was learned is really
    in the rows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if tied:
        make = bench.spec
        bench.spec = lambda **k: make(**k).model_copy(update={"base": tied_base})
    data = marked_data(bench, tmp_path / "data", marks)
    engine = bench.engine()
    ended: dict[str, Any] = {}
    settings = {"epochs": 4, "early_stopping": {"enabled": False}}
    bench.admit(engine, "a", ended, data=data, **settings)
    slot = engine.slots()[0]
    engine.run()
    from llamahome.training.engine.passes import make_unit

    unit = make_unit(slot, data.training, [0], weight=1.0, learns=False)
    (ours,) = engine.warm.logits([unit])
    engine.close()
    report = ended["a"].report
    assert report.base_unchanged

    model = AutoModelForCausalLM.from_pretrained(bench.spec().base.path)
    if marks[-1] >= VOCABULARY:
        model.resize_token_embeddings(marks[-1] + 1, mean_resizing=False)
    loaded = PeftModel.from_pretrained(model, str(ended["a"].folder))
    ids, _ = data.training.row(0)
    with torch.no_grad():
        theirs = loaded(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    torch.testing.assert_close(ours, theirs[unit.places], rtol=1e-4, atol=1e-4)
    saved = {name: value for name, value in weights(ended["a"]).items() if "token" in name}
    assert len(saved) == (1 if tied else 2)
    for rows in saved.values():
        assert float((rows[0] - rows[1]).abs().max()) > 1e-3, "both began as the mean row"


def test_gradients_are_those_of_peft_on_a_resized_base(
    bench: Bench, base_folder: Path, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llamahome.config import parse_training_config
    from llamahome.training.engine.passes import make_unit

    data = marked_data(bench, tmp_path / "data", (64, 65))
    lora = {"r": 4, "alpha": 8, "dropout": 0, "target_modules": ["q_proj", "v_proj"]}
    config = parse_training_config(bench.spec(lora=lora).config, source="test")
    engine = bench.engine()
    slot = engine.warm.slot_for(config, data.added)
    with torch.no_grad():
        slot.weights.normal_(std=0.1, generator=torch.Generator().manual_seed(9))
    start = slot.tensors()
    unit = make_unit(slot, data.training, [2], weight=1.0, learns=True)
    (ours,) = engine.warm.run([unit])
    gradients = slot.named(slot.gradient)
    engine.close()

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.resize_token_embeddings(66, mean_resizing=False)
    reference = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
            trainable_token_indices={"embed_tokens": [64, 65], "lm_head": [64, 65]},
        ),
    )  # fmt: skip
    named = {
        name.removesuffix(".default").replace(".default.", "."): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert named.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    ids, trained = data.training.row(2)
    values = torch.from_numpy(ids.astype(np.int64))[None]
    logits = reference(input_ids=values).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, values[0, 1:], reduction="none")
    theirs = losses[torch.from_numpy(trained[1:].copy())].sum()
    theirs.backward()

    assert ours.summed == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, parameter in named.items():
        assert parameter.grad is not None
        gap = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(gap) <= 2e-6, name


@pytest.mark.parametrize("marks", [(64, 65), (62, 63)])
def test_where_a_base_scales_what_it_looks_up_the_rows_are_kept_as_peft_has_them(
    bench: Bench, tmp_path: Path, marks: tuple[int, int]
) -> None:
    """Gemma 3 multiplies its embeddings by the root of their width: logits and gradients."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    from llamahome.config import parse_training_config
    from llamahome.training.engine.passes import make_unit

    torch.manual_seed(1)
    folder = tmp_path / "gemma3"
    Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
            sliding_window=8, max_position_embeddings=48, bos_token_id=None, eos_token_id=1,
            pad_token_id=None, initializer_range=0.1,
        )
    ).save_pretrained(folder)  # fmt: skip
    base = BaseRef(name="test/gemma3", path=str(folder), digest=base_digest(folder))
    make = bench.spec
    bench.spec = lambda **k: make(**k).model_copy(update={"base": base})
    data = marked_data(bench, tmp_path / "data", marks)
    lora = {"r": 4, "alpha": 8, "dropout": 0, "target_modules": ["q_proj", "v_proj"]}
    config = parse_training_config(bench.spec(lora=lora).config, source="test")
    engine = bench.engine()
    assert engine.warm.packed, engine.warm.why_not
    assert float(engine.warm.model.get_input_embeddings().scalar_embed_scale) > 5
    slot = engine.warm.slot_for(config, data.added)
    with torch.no_grad():
        slot.weights.normal_(std=0.1, generator=torch.Generator().manual_seed(9))
    start = slot.tensors()
    unit = make_unit(slot, data.training, [2], weight=1.0, learns=True)
    (ours,) = engine.warm.logits([unit])
    engine.warm.run([unit])
    gradients = slot.named(slot.gradient)
    engine.close()

    model = AutoModelForCausalLM.from_pretrained(folder)
    if marks[-1] >= VOCABULARY:
        model.resize_token_embeddings(marks[-1] + 1, mean_resizing=False)
    reference = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
            trainable_token_indices={"embed_tokens": list(marks)},
        ),
    )  # fmt: skip
    named = {
        name.removesuffix(".default").replace(".default.", "."): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert named.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    ids, trained = data.training.row(2)
    values = torch.from_numpy(ids.astype(np.int64))[None]
    logits = reference(input_ids=values).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], values[0, 1:], reduction="none")
    losses[torch.from_numpy(trained[1:].copy())].sum().backward()

    torch.testing.assert_close(ours, logits.detach()[unit.places], rtol=1e-4, atol=1e-4)
    for name, parameter in named.items():
        assert parameter.grad is not None
        gap = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(gap) <= 1e-4, name


def test_a_neighbour_with_added_tokens_changes_no_bit_of_another_job(
    bench: Bench, tmp_path: Path
) -> None:
    other = {"seed": 2, "batch_size": 1, "lora": {"r": 16, "dropout": 0.3}}
    mine = {"data": marked_data(bench, tmp_path / "data", (64, 65)), "seed": 1}
    expected = [file_bytes(bench.run({"a": each})["a"]) for each in (other, mine)]

    together = bench.run({"other": other, "mine": mine})

    assert [file_bytes(together[name]) for name in ("other", "mine")] == expected


def test_tokens_that_leave_a_gap_behind_the_bases_rows_are_refused(
    bench: Bench, tmp_path: Path
) -> None:
    data = marked_data(bench, tmp_path / "data", (65, 66))

    with pytest.raises(InvalidConfig, match="cannot be added to a base with 64"):
        bench.run({"a": {"data": data}})
    assert dataclasses.replace(data, added=()).added == ()
