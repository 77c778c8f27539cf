"""A tiny base model, made here in seconds: for demos and tests where no real base is at hand.

A byte-level BPE tokenizer and a Llama of 0.6 million parameters, pre-trained on the bundled primer
text, so that it is more than noise. Equal seeds give equal bytes on one kind of machine.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.errors import InvalidState

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig

CONTEXT = 1024
VOCABULARY = 2048
STEPS = 120
_ROWS, _LENGTH = 16, 32  # of a pre-training batch
_LEARNING_RATE = 1e-2
_PAD, _END_OF_TEXT, _START, _END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML. What the assistant writes, with the end marker, lies between the generation tags.
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] or '' }}
{%- if message['tool_calls'] %}
{{- message['tool_calls'] | tojson }}
{%- endif %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- (message['content'] or '') + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tiny(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Make the model in ``folder``; ``on_step`` is told (steps done, steps in all).

    With ``steps`` 0 the weights stay random. The folder appears under its name when it is complete.
    Raises InvalidState where ``folder`` is there and not empty, and OSError.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidState(
            "is there and not empty", file=str(folder), code="folder_not_empty",
            remedy="Name a new folder",
        )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        text = (resources.files("llamahome.conversations") / "samples" / "primer.txt").read_text(
            encoding="utf-8"
        )
        tokenizer = _train_tokenizer(text)
        _save_tokenizer(tokenizer, draft)
        config = _model_config(tokenizer)
        with _repeatable(seed):
            model = _new_model(config)
            _pretrain(
                model,
                _pretraining_ids(tokenizer, text),
                seed,
                steps,
                on_step or (lambda done, total: None),
            )
        _save_model(model, config, draft)
        draft.chmod(0o755)  # temporary folders and safetensors files are for their owner alone
        (draft / "model.safetensors").chmod(0o644)
        draft.rename(folder)  # an empty folder is replaced
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _train_tokenizer(text: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_PAD, _END_OF_TEXT, _START, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_paragraphs(text), trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": _END,
        "pad_token": _PAD,
        "additional_special_tokens": [_START, _END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _model_config(tokenizer: Tokenizer) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        # Three times the usual: so few steps then end 0.3 to 0.4 nats lower.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(_END),
        pad_token_id=tokenizer.token_to_id(_PAD),
    )


def _new_model(config: LlamaConfig) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config)


def _save_model(model: Any, config: LlamaConfig, folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    body = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    _write_json(folder / "config.json", body)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    _write_json(folder / "generation_config.json", ends)


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """One thread and deterministic kernels, whatever the machine; torch is put back afterwards."""
    import torch

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True)
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _pretrain(
    model: Any, ids: list[int], seed: int, steps: int, on_step: Callable[[int, int], None]
) -> None:
    """A few passes over random windows of ``ids``, loss on every token."""
    import torch

    stream = torch.tensor(ids)
    places = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=steps + 1, pct_start=0.1
    )
    model.train()
    for step in range(steps):
        starts = torch.randint(len(stream) - _LENGTH, (_ROWS,), generator=places)
        batch = torch.stack([stream[start : start + _LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, steps)


def _pretraining_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The primer twice: as plain text, and as turns, so that the markers mean something.

    An adapter trains no embeddings: what the base has never seen, it could not learn to write.
    """
    ids: list[int] = []
    paragraphs = _paragraphs(text)
    for paragraph in paragraphs:
        ids += tokenizer.encode(f"{paragraph}{_END_OF_TEXT}").ids
    for title, body in zip(paragraphs[::2], paragraphs[1::2], strict=False):
        turns = f"{_START}user\n{title}{_END}\n{_START}assistant\n{body}{_END}\n"
        ids += tokenizer.encode(turns).ids
    return ids


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
