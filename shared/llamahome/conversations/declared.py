"""What a base's configuration declares beside tokenizer.json: tokens, their names, chat templates.

Ids must be the ones that ``AutoTokenizer`` gives, so this follows transformers 5 step by step
(``PreTrainedTokenizerBase._from_pretrained`` and ``__init__``, ``TokenizersBackend.__init__``),
and refuses what that fails on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llamahome.conversations.base_files import (
    CONFIG_JSON,
    DECODER,
    BaseFiles,
    JsonFile,
    invalid,
)

_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_TEMPLATE = "chat_template"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, slots=True)
class Declared:
    """``named`` tokens by name (bos_token, ...), further special ones (``extra``), and those listed
    with an id (``added``), which are ``legacy`` where they are from added_tokens.json.
    ``templates`` are the chat templates by name, empty where there is none; ``file`` is the
    configuration's.
    """

    named: dict[str, AddedToken]
    extra: tuple[AddedToken, ...]
    added: dict[int, AddedToken]
    legacy: bool
    templates: dict[str, str]
    file: str

    def names(self) -> dict[str, str]:
        """``{"bos_token": "<s>", ...}``, as chat templates see them."""
        return {name: token.content for name, token in self.named.items()}

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that it lacks or has with other flags, in transformers' order: each new
        one gets the next id, whatever id it is listed with. Raises InvalidConfig.
        """
        there = tokenizer.get_added_tokens_decoder()
        listed = self.added | there if self.legacy else self.added
        tokens = [token for _, token in sorted(listed.items(), key=lambda item: item[0])]
        known = {token.content for token in [*there.values(), *tokens]}
        tokens += [token for token in self.named.values() if token.content not in known]
        tokens += [token for token in self.extra if token.content not in known]
        named = set(self.names().values())
        new: dict[str, AddedToken] = {}
        for token in tokens:
            # Set on the token itself, as its normalized, where that is not given, goes with it.
            token.special = token.special or token.content in named
            first = new.setdefault(token.content, token)
            if token.content not in known and repr(first) != repr(token):
                raise invalid(f"the token {token.content!r} has different flags", self.file)
        tokenizer.add_tokens(tokens)


def declared(files: BaseFiles) -> Declared:
    """Raises InvalidConfig naming the file and the key."""
    file, given = files.config.file, dict(files.config.content)
    if given.get("split_special_tokens"):
        raise invalid(
            "splits the control tokens of chat templates into text", file, "split_special_tokens",
            "Set it to false",
        )  # fmt: skip
    if _OLD_EXTRA in given and not given.get(_EXTRA):
        given[_EXTRA] = given.pop(_OLD_EXTRA)
    own = {key: given.pop(key) for key in list(given) if _is_own(key) and _is_text(given[key])}
    own |= _named_extra(given, file)
    if DECODER in given:
        added = _by_id(given[DECODER], file)
    else:
        if files.names is not None:
            _merge(given, files.names, file)
            own |= _named_extra(given, files.names.file)
        added = _from_legacy(files.added, given, file)
    padding = files.document.content.get("padding")
    if isinstance(padding, dict):
        given.setdefault("pad_token", padding.get("pad_token"))
    return Declared(
        named=_named(given, own, added, file),
        extra=_extra(given, files),
        added=added,
        legacy=DECODER not in given,
        templates=_templates(given.get(_TEMPLATE), files),
        file=file,
    )


def _named(
    given: Mapping[str, Any], own: Mapping[str, Any], added: Mapping[int, AddedToken], file: str
) -> dict[str, AddedToken]:
    """By name: the ones that every tokenizer may have, then those it has of its ``own``."""
    listed = {token.content: token for token in added.values()}
    found = {}
    for key in _NAMED:
        if key in own:
            found[key] = _token(own[key], file, key)
        elif given.get(key) is not None:
            token = _token(given[key], file, key)
            found[key] = listed.get(token.content, token)
    typed = {key: value for key, value in given.items() if _is_own(key) and _is_token(value)}
    own = {**typed, **own}
    return found | {key: _token(value, file, key) for key, value in own.items()}


def _is_own(key: str) -> bool:
    """Whether it names a token that only some tokenizers have, such as image_token."""
    return key.endswith("_token") and key not in _NAMED


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    """Whether transformers makes a token of it; other values of ``*_token`` keys are settings."""
    if isinstance(value, dict):
        return value.get("__type") == "AddedToken"
    return isinstance(value, (str, AddedToken))


def _named_extra(given: dict[str, Any], file: str) -> dict[str, AddedToken]:
    """Taken out of ``given``: extra_special_tokens where it is an object, of names and tokens."""
    if not isinstance(given.get(_EXTRA), dict):
        return {}
    if _is_token(given[_EXTRA]):
        raise invalid("must be a list of tokens, not one", file, _EXTRA)
    named = given.pop(_EXTRA)
    return {key: _token(value, file, f"{_EXTRA}.{key}") for key, value in named.items()}


def _extra(given: Mapping[str, Any], files: BaseFiles) -> tuple[AddedToken, ...]:
    key, source = _EXTRA, files.config
    if key not in given:
        key = _OLD_EXTRA
        if files.names is not None and key in files.names.content:
            source = files.names
    values = _list(given.get(key), source.file, key)
    return tuple(_token(value, source.file, key) for value in values)


def _merge(given: dict[str, Any], names: JsonFile, file: str) -> None:
    """Put special_tokens_map.json over the configuration, which is ``given``, of ``file``."""
    if _TEMPLATE in names.content:
        raise invalid("has no place here", names.file, _TEMPLATE, f"Move it to {CONFIG_JSON}")
    for key, value in names.content.items():
        if key == _EXTRA and value is not None and not isinstance(value, dict):
            more = [_further(one, names.file, key) for one in _list(value, names.file, key)]
            given[key] = [*_list(given.get(key), file, key), *more]
        elif key in (_EXTRA, _OLD_EXTRA):
            given[key] = value
        elif key in _NAMED or _is_own(key):
            unset = value is None or (_is_own(key) and not isinstance(value, (str, dict)))
            given[key] = None if unset else _mapped(value, names.file, key)


def _mapped(value: Any, file: str, key: str) -> AddedToken:
    """A token of special_tokens_map.json, where an object is one and is special."""
    if not isinstance(value, dict):
        return _token(value, file, key)
    return _flagged({**value, "special": True}, file, key)


def _further(value: Any, file: str, key: str) -> AddedToken:
    if isinstance(value, dict) and "special" in value:
        raise invalid("is special in any case", file, f"{key}.special", "Remove special")
    return _mapped(value, file, key)


def _from_legacy(
    added: JsonFile | None, given: Mapping[str, Any], file: str
) -> dict[int, AddedToken]:
    if added is None:
        return {}
    special = {str(given[key]) for key in _NAMED if given.get(key)}
    special |= {str(value) for value in _list(given.get(_EXTRA), file, _EXTRA)}
    found = {}
    for text, id in added.content.items():
        if not isinstance(id, int) or isinstance(id, bool):
            raise invalid(f"must be an id, not {id!r}", added.file, text)
        flags = {"content": text, "normalized": text not in special, "special": text in special}
        found[id] = _flagged(flags, added.file, text)
    return found


def _by_id(value: Any, file: str) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise invalid(f"must be an object of tokens by id, not {value!r:.80}", file, DECODER)
    found = {}
    for id, entry in value.items():
        try:
            number = int(id)
        except ValueError:
            raise invalid(f"the key {id!r:.80} is no id", file, DECODER) from None
        found[number] = _flagged(entry, file, f"{DECODER}.{id}")
    return found


def _token(value: Any, file: str, key: str) -> AddedToken:
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, dict) and _is_token(value):
        return _flagged(value, file, key)
    if isinstance(value, dict):
        raise invalid('an object here must have "__type": "AddedToken"', file, key)
    return AddedToken(checked_text(value, file, key), special=True)


def _flagged(entry: Any, file: str, key: str) -> AddedToken:
    if not isinstance(entry, dict):
        raise invalid(f"must be an object with content, not {entry!r:.80}", file, key)
    flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise invalid(f"must be true or false, not {value!r:.80}", file, f"{key}.{flag}")
    return AddedToken(checked_text(entry.get("content"), file, f"{key}.content"), **flags)


def _list(value: Any, file: str, key: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid(f"must be a list of tokens, not {value!r:.80}", file, key)
    return value


def _templates(value: Any, files: BaseFiles) -> dict[str, str]:
    """Templates in files of their own take the place of all in the configuration."""
    file = files.config.file
    if files.templates:
        return dict(files.templates)
    if value is None:
        return {}
    if isinstance(value, str):
        value = {"default": value}
    elif isinstance(value, list):
        value = dict(_entry(entry, file, f"{_TEMPLATE}[{n}]") for n, entry in enumerate(value))
    elif not isinstance(value, dict):
        raise invalid(f"must be text or a list, not {value!r:.80}", file, _TEMPLATE)
    return {name: checked_text(text, file, f"{_TEMPLATE}.{name}") for name, text in value.items()}


def _entry(entry: Any, file: str, key: str) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise invalid(f"must be an object of name and template, not {entry!r:.80}", file, key)
    name, text = (entry.get(part) for part in ("name", "template"))
    return checked_text(name, file, f"{key}.name"), checked_text(text, file, f"{key}.template")


def checked_text(value: Any, file: str, key: str) -> str:
    """``value`` if it is text that can be encoded. Raises InvalidConfig."""
    if not isinstance(value, str):
        said = "is missing" if value is None else f"must be text, not {value!r:.80}"
        raise invalid(said, file, key)
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise invalid("holds half of a surrogate pair", file, key)
    return value
