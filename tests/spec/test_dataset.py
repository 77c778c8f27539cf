"""``ConversationDataset`` with real tokenizers of transformers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.conversations import Conversation
from llamahome.conversations.chat import ChatBase
from llamahome.errors import InvalidConfig, InvalidData
from support.bases import FAMILIES, write_base

from .conftest import conversation

pytestmark = pytest.mark.model

THREE = [conversation(1), conversation(20), conversation(300)]
TALK = {
    "messages": [
        {"role": "system", "content": "Thank you very much."},
        {"role": "user", "content": "Hello there!"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is  the answer?"},
        {"role": "assistant", "content": "42."},
    ]
}
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A transformers tokenizer of one of the families, with one of their templates or none."""

    def make(template: str | None = "chatml_generation", family: str = "byte_level") -> Any:
        from transformers import AutoTokenizer

        folder = tmp_path_factory.mktemp("base")
        return AutoTokenizer.from_pretrained(write_base(folder, template, family))

    return make


def dataset(conversations: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    from llamahome.local import ConversationDataset

    return ConversationDataset(conversations, tokenizer, **options)


def test_items_are_three_tensors_of_max_length(load: Load) -> None:
    """BEHAVIOUR 45: len; exactly the three keys; int64, one dimension, padded to max_length."""
    import inspect

    import torch

    from llamahome.local import ConversationDataset

    signature = inspect.signature(ConversationDataset.__init__).parameters
    assert list(signature) == ["self", "conversations", "tokenizer", "max_length"]
    assert signature["max_length"].default == 512
    assert issubclass(ConversationDataset, torch.utils.data.Dataset)
    found = dataset(THREE, load(), max_length=80)
    assert len(found) == 3
    for item in found:
        assert sorted(item) == ["attention_mask", "input_ids", "labels"]
        for tensor in item.values():
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.int64, (80,))
    assert dataset(THREE, load())[0]["input_ids"].shape == (512,)


def test_indices_end_where_the_items_do(load: Load) -> None:
    """BEHAVIOUR 46: IndexError beyond both ends, so iteration ends; negative ones count back."""
    import torch

    found = dataset(THREE, load(), max_length=80)
    for index in (3, -4, 100):
        with pytest.raises(IndexError):
            found[index]
    assert len(list(found)) == 3
    for name, tensor in found[-1].items():
        assert torch.equal(tensor, found[2][name])
        assert torch.equal(tensor, dataset(THREE, load(), max_length=80)[2][name])
    assert len(dataset([], load())) == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_it_can_be_pickled_collated_and_read_by_worker_processes(load: Load) -> None:
    """BEHAVIOUR 46: num_workers > 0 and the default collate give what reading it here gives."""
    import torch

    found = dataset(THREE, load(), max_length=80)
    again = pickle.loads(pickle.dumps(found))
    loader = torch.utils.data.DataLoader(again, batch_size=2, num_workers=2)
    batches = list(loader)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 80), (1, 80)]
    whole = torch.cat([batch["labels"] for batch in batches])
    assert torch.equal(whole, torch.stack([item["labels"] for item in found]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("template", ["chatml", "chatml_generation", "llama3", None])
def test_the_text_is_the_conversation_in_the_base_s_form(
    load: Load, family: str, template: str | None
) -> None:
    """BEHAVIOUR 47: the ids are those of the tokenizer's own chat template, turn by turn, with no
    second beginning token; without a template the fallback's form, ended by the end token."""
    tokenizer = load(template, family)
    item = dataset([TALK], tokenizer, max_length=500)[0]
    ids = item["input_ids"][item["attention_mask"] == 1].tolist()
    if template is not None:
        wanted = tokenizer.apply_chat_template(TALK["messages"], tokenize=True, return_dict=True)
        assert ids == wanted["input_ids"]
    assert ids.count(tokenizer.bos_token_id) <= 1
    exact = family == "byte_level"  # the others' test files have no decoder: spaces are not kept
    text = tokenizer.decode(ids) if exact else _solid(tokenizer.decode(ids))
    contents = [turn["content"] for turn in TALK["messages"]]
    places = [text.find(content if exact else _solid(content)) for content in contents]
    assert -1 not in places
    assert places == sorted(places)
    if template is None:
        assert text.startswith(tokenizer.bos_token)
        learned = item["labels"][item["labels"] >= 0].tolist()
        assert _solid(tokenizer.decode(learned)) == "Hello!</s>42.</s>"


def _solid(text: str) -> str:
    return "".join(text.replace("\u2581", "").split())


@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
def test_padding_is_never_learned_and_a_real_end_is(load: Load, pad: str | None) -> None:
    """BEHAVIOUR 49: a missing pad token is no error and the tokenizer is left as it was; pads have
    attention 0 and label -100, and a real end token keeps its label even where pad is the same."""
    tokenizer = load(None)
    tokenizer.pad_token = pad
    found = dataset([TALK], tokenizer, max_length=200)
    assert tokenizer.pad_token == pad
    assert found.pad_token_id == tokenizer.convert_tokens_to_ids(pad or "</s>")
    item = found[0]
    tokens = found.lengths[0]
    assert item["attention_mask"].tolist() == [1] * tokens + [0] * (200 - tokens)
    assert set(item["input_ids"][tokens:].tolist()) == {found.pad_token_id}
    assert set(item["labels"][tokens:].tolist()) == {-100}
    assert (item["labels"] == tokenizer.eos_token_id).sum() == 2  # one of each answer


def test_a_pad_token_may_be_a_piece_of_words(load: Load) -> None:
    """BEHAVIOUR 49: it pads, and in text it is what it was, as in transformers."""
    plain, tokenizer = load(), load()
    tokenizer.pad_token = "e"
    found = dataset([TALK], tokenizer, max_length=200)
    assert found.pad_token_id == tokenizer.convert_tokens_to_ids("e")
    tokens = found.lengths[0]
    assert found[0]["input_ids"][:tokens].equal(dataset([TALK], plain)[0]["input_ids"][:tokens])
    assert set(found[0]["input_ids"][tokens:].tolist()) == {found.pad_token_id}
    assert found[0]["attention_mask"].sum() == tokens


def test_a_control_token_that_is_a_piece_of_words_is_refused_by_name(load: Load) -> None:
    """BEHAVIOUR 49, 54: text and control could not be told apart."""
    for name in ("eos_token", "unk_token"):
        tokenizer = load()
        setattr(tokenizer, name, "e")
        with pytest.raises(InvalidConfig, match=r"tokenizer: the special token 'e'.*'<pad>'"):
            dataset([TALK], tokenizer)
    tokenizer = load()
    tokenizer.backend_tokenizer.add_special_tokens(["e"])
    tokenizer.pad_token = "e"
    with pytest.raises(InvalidConfig, match="the special token 'e'"):
        dataset([TALK], tokenizer)


def test_labels_are_a_copy_of_the_learned_ids(load: Load) -> None:
    """BEHAVIOUR 50: -100 exactly where nothing is learned, the id elsewhere; changing a tensor
    changes neither the other nor the dataset."""
    found = dataset([TALK], load(), max_length=200)
    item = found[0]
    learned = item["labels"] != -100
    assert 0 < learned.sum() < found.lengths[0]
    assert (item["labels"][learned] == item["input_ids"][learned]).all()
    before = copy.deepcopy(found[0])
    item["input_ids"].fill_(7)
    assert not (item["labels"] == 7).all()
    item["labels"].fill_(9)
    for name, tensor in found[0].items():
        assert (tensor == before[name]).all()


def test_what_is_learned_is_a_setting(load: Load) -> None:
    """BEHAVIOUR 51: answers by default, the last one, or all; the default collate keeps it."""
    import torch

    from llamahome.local import ConversationDataset

    tokenizer, counts = load(), {}
    for scope in ("assistant", "last", "all"):
        kind = type("Scoped", (ConversationDataset,), {"loss_scope": scope})
        found = kind([TALK], tokenizer, 200)
        [batch] = torch.utils.data.DataLoader(found)
        learned = batch["labels"][0]
        counts[scope] = int((learned >= 0).sum())
        if scope != "all":
            text = tokenizer.decode(learned[learned >= 0].tolist())
            assert text == ("Hello!<|im_end|>" if scope == "assistant" else "") + "42.<|im_end|>"
    assert counts["last"] < counts["assistant"] < counts["all"] == found.lengths[0]


def test_long_conversations_are_cut_between_tokens_or_dropped_and_counted(load: Load) -> None:
    """BEHAVIOUR 52: exactly max_length is whole; one less is cut, while an answer's token is left;
    else it is no item and is counted."""
    tokenizer = load()
    [length] = dataset([TALK], tokenizer, max_length=500).lengths
    whole, cut = (dataset([TALK], tokenizer, max_length=n) for n in (length, length - 1))
    assert (whole.lengths, cut.lengths) == ([length], [length - 1])
    assert (cut[0]["input_ids"] == whole[0]["input_ids"][: length - 1]).all()
    first = int((whole[0]["labels"] >= 0).nonzero()[0])
    assert (dataset([TALK], tokenizer, max_length=first + 1)[0]["labels"] >= 0).sum() == 1
    none = dataset([TALK, conversation(1)], tokenizer, max_length=max(first, 8))
    assert none.dropped["too_long_no_answer"] == 2 - len(none)
    assert none.dropped["too_long_no_answer"] >= 1


@pytest.mark.parametrize("length", [7, 0, -1, True, 8.0, "512"])
def test_a_max_length_that_can_hold_no_turn_is_refused(load: Load, length: Any) -> None:
    """BEHAVIOUR 53: below 8 is refused, naming the field; 8 does not crash."""
    tokenizer = load()
    with pytest.raises(InvalidConfig) as caught:
        dataset(THREE, tokenizer, max_length=length)
    assert caught.value.place.field == "max_length"
    short = dataset(THREE, tokenizer, max_length=8)
    assert len(short) + sum(short.dropped.values()) == 3


def test_a_bad_conversation_is_named(load: Load) -> None:
    """BEHAVIOUR 34: an unknown role is refused naming the conversation, the message and the role,
    and never taken for another."""
    bad = {"conversation": [*THREE[0]["conversation"], {"role": "narrator", "content": "So."}]}
    with pytest.raises(InvalidData, match=r"conversation 1: message 2: .*narrator") as caught:
        dataset([THREE[0], bad], load())
    assert caught.value.code == "invalid_role"


def test_ids_are_those_of_the_stages(load: Load, tmp_path: Path) -> None:
    """BEHAVIOUR 54: every id is in the vocabulary, lengths are kept, and they are what the
    preprocessing stage makes of the base's own files."""
    tokenizer = load("llama3")
    found = dataset([TALK], tokenizer, max_length=500)
    chat = ChatBase.load(write_base(tmp_path / "base", "llama3"))
    row = chat.tokenise(Conversation(tuple(TALK["messages"])), loss_scope="assistant")
    assert found[0]["input_ids"][: found.lengths[0]].tolist() == row.ids.tolist()
    assert (found[0]["labels"][: found.lengths[0]] >= 0).tolist() == row.trained.tolist()
    assert int(found[0]["input_ids"].max()) < len(tokenizer)


def test_a_tokenizer_without_special_tokens_will_do(load: Load) -> None:
    """BEHAVIOUR 54: no bos, eos, pad or template: plain text, and 0 for padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=plain), plain):
        found = dataset([THREE[0]], tokenizer, max_length=120)
        assert found.pad_token_id == 0
        assert (found[0]["labels"] >= 0).sum() == len("It is 2.")


def test_a_slow_tokenizer_is_made_fast_or_refused_by_name(tmp_path: Path) -> None:
    """BEHAVIOUR 54: slow and fast tokenizers: one that can be converted is, another is named."""
    from transformers import PythonBackend

    class Slow(PythonBackend):  # type: ignore[misc]
        """Words to ids, in Python."""

        def __init__(self) -> None:
            self._words = {"a": 0, "b": 1}
            super().__init__()

        @property
        def vocab_size(self) -> int:
            return len(self._words)

        def get_vocab(self) -> dict[str, int]:
            return dict(self._words)

    assert not Slow().is_fast
    with pytest.raises(InvalidConfig, match="Slow cannot be made a fast tokenizer") as caught:
        dataset(THREE, Slow())
    assert caught.value.place.field == "tokenizer"
