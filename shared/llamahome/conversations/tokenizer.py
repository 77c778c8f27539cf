"""A base's tokenizer, from its files, with the ``tokenizers`` library alone.

Only ``tokenizer.json`` is read for the vocabulary; the files beside it add special tokens, their
names and the chat templates, as transformers has them (``declared``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from llamahome.conversations.base_files import (
    CONFIG_JSON,
    TOKENIZER_JSON,
    BaseFiles,
    JsonFile,
    invalid,
    read_files,
    tokenizer_of,
)
from llamahome.conversations.bytelevel import ByteLevelCore
from llamahome.conversations.declared import Declared, declared
from llamahome.conversations.markers import MarkerIds, with_markers
from llamahome.conversations.raw_text import around_text
from llamahome.conversations.templates import FALLBACK_TEMPLATE
from llamahome.errors import InvalidConfig
from llamahome.schemas import JsonObject

# A control token's other name, which no text of a row may hold (``chat`` sees to it).
RENAME_MARKS = ("\U0010fffc", "\U0010fffd")
# Ids are kept in 32 bits, with a sign.
_MAX_ID = 2**31 - 1
_POST = "post_processor"


def marked_files(base_dir: Path) -> tuple[JsonObject, JsonObject, MarkerIds]:
    """The base's tokenizer.json and tokenizer_config.json with the markers (``markers``). Together
    they take the place of all its files but special_tokens_map.json.

    Raises NotFound and InvalidConfig.
    """
    files, markers = _marked(read_files(base_dir))
    return dict(files.document.content), dict(files.config.content), markers


def _marked(files: BaseFiles) -> tuple[BaseFiles, MarkerIds]:
    document, config, markers = with_markers(files.document, files.config, declared(files).add_to)
    return BaseFiles(document, config, files.names), markers


@dataclasses.dataclass(frozen=True, slots=True)
class AddedName:
    """An added token: its text, its id, and whether it is declared special.

    ``normalized`` ones are looked for after the others; a ``plain`` one matches its text alone,
    whatever stands beside it.
    """

    text: str
    id: int
    special: bool
    normalized: bool = False
    plain: bool = True


class ChatTokenizer:
    """Text to ids. ``encode`` gives offsets in characters, untrimmed; nothing is ever added.

    ``named`` are the special tokens by name (bos_token, ...); ``templates`` the base's own chat
    templates by name, empty where it has none; ``digest`` the sha256 over all that decides ids.
    ``around`` is what stands around raw text; ``markers`` the ids of marker tokens, where added.
    """

    def __init__(self, document: JsonObject, config: Mapping[str, Any]) -> None:
        """From the contents of tokenizer.json and tokenizer_config.json. Raises InvalidConfig."""
        files = BaseFiles(JsonFile(TOKENIZER_JSON, document), JsonFile(CONFIG_JSON, config))
        self._build(_plain_tokenizer(files), document.get(_POST), declared(files), None)

    def _build(
        self,
        tokenizer: Tokenizer,
        post_processor: JsonObject | None,
        declared: Declared,
        markers: MarkerIds | None,
    ) -> None:
        self.named = declared.names()
        declared.add_to(tokenizer)
        self._tokenizer = tokenizer
        self._text = tokenizer.to_str()
        self._core: ByteLevelCore | None = None
        self.markers = markers
        self.around = around_text(tokenizer, post_processor, self.named)
        self.templates = declared.templates
        self.added = tuple(
            AddedName(
                token.content,
                id,
                token.special,
                token.normalized,
                not (token.lstrip or token.rstrip or token.single_word),
            )
            for id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        )
        whole = json.loads(self._text)
        _check_ids(whole["model"]["vocab"])
        self.unknown = _unknown(whole["model"])
        found = tokenizer.token_to_id(self.unknown) if self.unknown else None
        self.unknown_id = -1 if found is None else found
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        identity = json.dumps([whole, self.named], sort_keys=True)
        self.digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def load(cls, base_dir: Path, *, markers: bool = False) -> ChatTokenizer:
        """Read the base's files, and add the ``markers`` and their template where they are wanted.

        Raises NotFound and InvalidConfig naming the file.
        """
        files, ids = read_files(base_dir), None
        if markers:
            files, ids = _marked(files)
        tokenizer, post_processor = _plain_tokenizer(files), files.document.content.get(_POST)
        also = declared(files)
        del files  # some 50 MB for a large vocabulary, and there is another one to come
        found = cls.__new__(cls)
        found._build(tokenizer, post_processor, also, ids)
        return found

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of ``text``, with every added token recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def text_of(self, id: int) -> str:
        """What the token of this id is called; "" where there is none."""
        return self._tokenizer.id_to_token(id) or ""

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """As :meth:`encode`, several at once."""
        found: list[Encoding] = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return found

    def byte_level(self) -> ByteLevelCore:
        """The same vocabulary on a faster core. Raises NotByteLevel with the reason."""
        if self._core is None:
            self._core = ByteLevelCore(json.loads(self._text), self._tokenizer)
        return self._core

    def renamed(self, names: Collection[str]) -> Tokenizer:
        """A twin that knows each token of ``names`` under its other name only, with the same id.

        In text for the twin, ``other_name(token)`` is the control token, and the token's usual
        spelling is text like any other.
        """
        document = json.loads(self._text)
        other = {name: other_name(name) for name in names}
        for token in document["added_tokens"]:
            token["content"] = other.get(token["content"], token["content"])
        model = document["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {other.get(key, key): id for key, id in model["vocab"].items()}
        else:
            model["vocab"] = [[other.get(key, key), score] for key, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = other.get(model["unk_token"], model["unk_token"])
        twin = Tokenizer.from_str(json.dumps(document))
        for name, new in other.items():
            if twin.token_to_id(new) != self._tokenizer.token_to_id(name):
                raise InvalidConfig(
                    f"the token {name!r} cannot be kept apart from text", code="invalid_base",
                    file=TOKENIZER_JSON,
                )  # fmt: skip
        return twin

    def template_for(self, *, tools: bool) -> str:
        """The chat template for rows with or without tools; the fallback where there is none.

        Raises InvalidConfig where the base has several and none is called default.
        """
        if not self.templates:
            return FALLBACK_TEMPLATE
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            raise InvalidConfig(
                f"chat templates {', '.join(sorted(self.templates))}, but none is called default",
                code="invalid_base", field="chat_template",
            )  # fmt: skip
        return self.templates["default"]


def _plain_tokenizer(files: BaseFiles) -> Tokenizer:
    """Without its post-processor: that would only trim offsets, and templates write bos."""
    return tokenizer_of(files.document, truncation=None, padding=None, post_processor=None)


def _check_ids(vocabulary: JsonObject | list[Any]) -> None:
    largest = max(vocabulary.values(), default=0) if isinstance(vocabulary, dict) else 0
    if largest > _MAX_ID:
        raise invalid(f"has the id {largest}, at most {_MAX_ID}", TOKENIZER_JSON, "model.vocab")


def other_name(token: str) -> str:
    return f"{RENAME_MARKS[0]}{token}{RENAME_MARKS[1]}"


def _unknown(model: JsonObject) -> str | None:
    """What the model calls text that it has no token for."""
    if model["type"] == "Unigram":
        place = model.get("unk_id")
        return None if place is None else str(model["vocab"][place][0])
    return model.get("unk_token")
