"""Generated conversations with the word frequencies of a language, and a base to go with them."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_LENGTH = 2048


class _Words:
    """Text with the word frequencies of a language: ranks by Zipf, some digits, some CJK."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._words = [self._word() for _ in range(40_000)]
        self._weights = list(itertools.accumulate(1 / (place + 3) for place in range(40_000)))

    def _word(self) -> str:
        pick = self._random.choice
        return "".join(
            pick("bcdfghjklmnprstvwz") + pick("aeiou") + pick(["", "", pick("lnrst")])
            for _ in range(pick([1, 1, 2, 2, 2, 3, 3, 4]))
        )

    def sentences(self, count: int) -> str:
        return " ".join(self._sentence() for _ in range(count))

    def _sentence(self) -> str:
        draw = self._random
        words = draw.choices(self._words, cum_weights=self._weights, k=draw.randint(5, 22))
        extra = draw.choices(
            ["", f" {draw.randint(1, 9999)}", " 東京は日本の首都です", " Größe café"],
            [80, 10, 5, 5],
        )[0]
        return " ".join(words).capitalize() + extra + draw.choice([".", ".", ".", "?", ":\n- "])

    def conversation(self, number: int) -> list[dict[str, str]]:
        draw = self._random
        messages = [] if number % 3 else [{"role": "system", "content": self.sentences(1)}]
        for _ in range(draw.choice([1, 1, 2, 3])):
            for role, longest in (("user", 4), ("assistant", 12)):
                text = self.sentences(draw.randint(1, longest))
                messages.append({"role": role, "content": text})
        return messages


def make_data(folder: Path, rows: int, *, vocabulary: int = 32_000) -> None:
    """``base/`` with a tokenizer of so many tokens and a template, and ``rows.jsonl``."""
    words = _Words(1)
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (words.sentences(10) for _ in range(4000)),
        trainers.BpeTrainer(
            vocab_size=vocabulary, show_progress=False,
            special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    base = folder / "base"
    base.mkdir()
    tokenizer.save(str(base / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>",
        "pad_token": "</s>", "chat_template": _TEMPLATE, "model_max_length": MAX_LENGTH,
    }  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        for number in range(rows):
            row = {"file": "rows.jsonl", "line": number + 1,
                   "messages": words.conversation(number)}  # fmt: skip
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_rows(folder: Path, share: int, of: int) -> Iterator[dict[str, Any]]:
    """Every ``of``-th row, from the ``share``-th on."""
    with (folder / "rows.jsonl").open("rb") as lines:
        for number, line in enumerate(lines):
            if number % of == share:
                yield json.loads(line)


def fresh(folder: Path) -> Path:
    """The same data in a folder where no contender has been."""
    fresh = Path(tempfile.mkdtemp(dir=folder))
    for name in ("base", "rows.jsonl"):
        (fresh / name).symlink_to(folder / name)
    return fresh
