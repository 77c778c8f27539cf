from __future__ import annotations

import hashlib
import math
from importlib import resources
from pathlib import Path

import pytest

from llamahome.errors import InvalidState
from llamahome.training import make_tiny

pytestmark = pytest.mark.model

ROW = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|> ü"},
    {"role": "assistant", "content": " Hello\n there "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Done."},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-trained for a sixth of the usual time."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    make_tiny(folder, steps=20)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_transformers_loads_it_and_it_has_learned_something(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)

    assert sum(p.numel() for p in model.parameters()) == 631_424
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (
        2048, "<|im_end|>", "<|pad|>",
    )  # fmt: skip
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 1024
    ids = tokenizer(primer()[:2000], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < math.log(2048) - 0.8


def primer() -> str:
    path = resources.files("llamahome.conversations") / "samples" / "primer.txt"
    return path.read_text(encoding="utf-8")


def test_any_text_survives_the_tokenizer(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = " leading\n\ttabs 漢字 🙂 e\u0301 \u0000 trailing  "

    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_template_marks_answers_with_their_end_marker_and_nothing_else(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = [{**message, "content": message["content"].replace("<|im_end|>", "")} for message in ROW]

    out = tokenizer.apply_chat_template(
        row, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )

    pairs = list(zip(out["input_ids"], out["assistant_masks"], strict=True))
    trained = tokenizer.decode([token for token, mask in pairs if mask])
    assert trained == " Hello\n there <|im_end|>Done.<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        row[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert out["input_ids"][: len(prompt)] == prompt


def test_equal_seeds_give_equal_bytes_whatever_torch_is_set_to(tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    make_tiny(tmp_path / "a", steps=3)
    torch.set_num_threads(2)
    torch.manual_seed(9)
    try:
        make_tiny(tmp_path / "b", steps=3)
    finally:
        torch.set_num_threads(threads)
    make_tiny(tmp_path / "c", steps=3, seed=1)

    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")

    with pytest.raises(InvalidState, match="not empty"):
        make_tiny(tmp_path, steps=0)
    with pytest.raises(InvalidState, match="not empty"):
        make_tiny(tmp_path / "mine.txt", steps=0)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_when_it_is_interrupted(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tiny(tmp_path / "base", steps=3, on_step=interrupt)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_two_full_builds_in_two_processes_are_equal(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import pathlib, sys; from llamahome.training import make_tiny; "
        "make_tiny(pathlib.Path(sys.argv[1]))"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)

    assert digests(tmp_path / "a") == digests(tmp_path / "b")
