"""A base's tokenizer, from its files, with the ``tokenizers`` library alone.

Only ``tokenizer.json`` is read for the vocabulary; ``tokenizer_config.json`` and
``special_tokens_map.json`` add the names of special tokens and the chat template, with the same
precedence transformers has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from llamahome.conversations.bytelevel import ByteLevelCore
from llamahome.conversations.markers import MarkerIds, with_markers
from llamahome.conversations.raw_text import around_text
from llamahome.conversations.templates import FALLBACK_TEMPLATE
from llamahome.errors import InvalidConfig, NotFound
from llamahome.schemas import JsonObject

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_NAMES_JSON = "special_tokens_map.json"
_FILES = (TOKENIZER_JSON, CONFIG_JSON, _NAMES_JSON, TEMPLATE_FILE)
_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# A control token's other name, which no text of a row may hold (``chat`` sees to it).
RENAME_MARKS = ("\U0010fffc", "\U0010fffd")


def tokenizer_files(base_dir: Path) -> list[Path]:
    """The base's tokenizer files that are there, in a fixed order; tokenizer.json must be.

    Raises NotFound (no such folder) and InvalidConfig (no tokenizer.json), with the remedy.
    """
    if not base_dir.is_dir():
        raise NotFound(
            "the base's folder is not there", code="model_not_found", file=str(base_dir),
            remedy="Mount it on this worker, or register the base again with its new folder",
        )  # fmt: skip
    found = [base_dir / name for name in _FILES if (base_dir / name).is_file()]
    if not found or found[0].name != TOKENIZER_JSON:
        raise InvalidConfig(
            "the base has no tokenizer.json", code="invalid_base", file=str(base_dir),
            remedy="Save its tokenizer once with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)",
        )  # fmt: skip
    return found


def marked_files(base_dir: Path) -> tuple[JsonObject, JsonObject, MarkerIds]:
    """The base's tokenizer.json and tokenizer_config.json with the markers (``markers``).

    Raises NotFound and InvalidConfig.
    """
    files = {path.name: path for path in tokenizer_files(base_dir)}
    config = _read_json(files[CONFIG_JSON]) if CONFIG_JSON in files else {}
    declared = _with_names(config, files)

    def complete(tokenizer: Tokenizer) -> None:
        _add_missing(tokenizer, declared, _named_tokens(declared))

    return with_markers(_read_json(files[TOKENIZER_JSON]), config, complete)


def _with_names(config: JsonObject, files: Mapping[str, Path]) -> JsonObject:
    """tokenizer_config.json with the names of special_tokens_map.json, as transformers has them:
    they come before the config's own, and count only where that has no added_tokens_decoder."""
    if "added_tokens_decoder" in config or _NAMES_JSON not in files:
        return config
    return config | _read_json(files[_NAMES_JSON])


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

    def __init__(
        self, document: JsonObject, config: Mapping[str, Any], markers: MarkerIds | None = None
    ) -> None:
        """Raises InvalidConfig where the tokenizer cannot be read."""
        self._build(_plain_tokenizer(document), document.get("post_processor"), config, markers)

    def _build(
        self,
        tokenizer: Tokenizer,
        post_processor: JsonObject | None,
        config: Mapping[str, Any],
        markers: MarkerIds | None,
    ) -> None:
        self.named = _named_tokens(config)
        _add_missing(tokenizer, config, self.named)
        self._tokenizer = tokenizer
        self._text = tokenizer.to_str()
        self.markers = markers
        self.around = around_text(tokenizer, post_processor, self.named)
        self.templates = _templates(config)
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
        files = {path.name: path for path in tokenizer_files(base_dir)}
        ids = None
        if markers:
            document, config, ids = marked_files(base_dir)
            config = _with_names(config, files)
        else:
            document = _read_json(files[TOKENIZER_JSON])
            config = _read_json(files[CONFIG_JSON]) if CONFIG_JSON in files else {}
            config = _with_names(config, files)
            if TEMPLATE_FILE in files:
                config["chat_template"] = _read(files[TEMPLATE_FILE])
        tokenizer, post_processor = _plain_tokenizer(document), document.get("post_processor")
        del document  # some 50 MB for a large vocabulary, and there is another one to come
        found = cls.__new__(cls)
        found._build(tokenizer, post_processor, config, ids)
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
        return ByteLevelCore(json.loads(self._text), self._tokenizer)

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


def _plain_tokenizer(document: JsonObject) -> Tokenizer:
    """Without its post-processor: that would only trim offsets, and templates write bos."""
    plain = {**document, "truncation": None, "padding": None, "post_processor": None}
    try:
        return Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare Exception
        raise InvalidConfig(
            f"the tokenizer cannot be read: {error}", code="invalid_base", file=TOKENIZER_JSON
        ) from None


def other_name(token: str) -> str:
    return f"{RENAME_MARKS[0]}{token}{RENAME_MARKS[1]}"


def _unknown(model: JsonObject) -> str | None:
    """What the model calls text that it has no token for."""
    if model["type"] == "Unigram":
        place = model.get("unk_id")
        return None if place is None else str(model["vocab"][place][0])
    return model.get("unk_token")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(
            f"cannot be read: {error}", code="invalid_base", file=str(path)
        ) from None


def _read_json(path: Path) -> JsonObject:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise InvalidConfig(f"broken JSON: {error}", code="invalid_base", file=str(path)) from None
    if not isinstance(content, dict):
        raise InvalidConfig("must be a JSON object", code="invalid_base", file=str(path))
    return content


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``{"bos_token": "<s>", ...}``; a token is written as text or as an object with content."""
    found = {}
    for name in _NAMED:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _add_missing(tokenizer: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that the configuration declares and tokenizer.json does not, as transformers does."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    entries = sorted(declared.items(), key=lambda item: int(item[0])) if declared else []
    for _, entry in entries:
        if entry["content"] not in known:
            known.add(entry["content"])
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            tokenizer.add_tokens(
                [AddedToken(entry["content"], **{k: entry[k] for k in flags if k in entry})]
            )
    for text in named.values():
        if text not in known:
            known.add(text)
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _templates(config: Mapping[str, Any]) -> dict[str, str]:
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return {}
