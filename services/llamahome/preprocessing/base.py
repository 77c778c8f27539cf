"""The base's tokenizer and template, read once in a process for as long as its files stay."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from llamahome.conversations.base_files import (
    invalid,
    read_bytes,
    read_object,
    tokenizer_files,
)
from llamahome.conversations.bytelevel import NotByteLevel
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.fastpath import FastChat
from llamahome.conversations.markers import MarkerIds
from llamahome.conversations.proof import unproven
from llamahome.conversations.shaped import ShapedChat
from llamahome.schemas import StageTask

_MODEL_CONFIG = "config.json"
# So many dates of one base are kept: jobs of yesterday run beside those of today.
_DATES = 2


Fast = tuple[FastChat | ShapedChat | None, str]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedBase:
    """``vocabulary`` is the model's number of embeddings, None where its config does not say.

    ``files`` are the tokenizer's, by their names below the base's folder; ``markers`` the marker
    tokens' ids where the job's template is ``markers``.
    """

    chat: ChatBase
    files: Mapping[str, Path]
    files_digest: str
    vocabulary: int | None
    # Kept here, so that nothing of a base is held for longer than the base itself.
    _proven: dict[str, Fast] = dataclasses.field(default_factory=dict, init=False)
    _dated: dict[str, LoadedBase] = dataclasses.field(default_factory=dict, init=False)

    def fast(self, loss_scope: str) -> Fast:
        """The fastest path that was proven for this base and scope, None for the template row by
        row; and why it is no faster one.
        """
        if loss_scope not in self._proven:
            self._proven[loss_scope] = _prove(self.chat, loss_scope)
        return self._proven[loss_scope]

    def on(self, today: str | None) -> LoadedBase:
        """This base with the date of a plan; it is the same where the template asks for none."""
        if today is None or not self.chat.uses_clock:
            return self
        if today not in self._dated:
            while len(self._dated) >= _DATES:
                del self._dated[next(iter(self._dated))]
            chat = ChatBase(self.chat.tokenizer, today=datetime.datetime.fromisoformat(today))
            self._dated[today] = dataclasses.replace(self, chat=chat)
        return self._dated[today]

    @property
    def markers(self) -> MarkerIds | None:
        return self.chat.tokenizer.markers

    @property
    def tokenizer_digest(self) -> str:
        return self.chat.tokenizer_digest

    @property
    def template_digest(self) -> str:
        return self.chat.template_digest


def load_base(task: StageTask) -> LoadedBase:
    """The job's base, with the date of its plan. Raises NotFound, InvalidConfig."""
    folder = Path(task.spec.base.path)
    # A file that was replaced has another time or size, and is read again.
    paths = [*tokenizer_files(folder).values(), folder / _MODEL_CONFIG]
    state = tuple((path, *_identity(path)) for path in paths if path.is_file())
    markers = task.spec.config["template"] == "markers"
    return _load(folder, state, markers).on(task.plan.get("today"))


def _identity(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _load(folder: Path, state: tuple[tuple[Path, int, int], ...], markers: bool) -> LoadedBase:
    files = tokenizer_files(folder)
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0".encode() + read_bytes(path) + b"\0")
    chat = ChatBase.load(folder, markers=markers)
    trim_heap()  # some 80 MB after a vocabulary of 128,000
    return LoadedBase(
        chat=chat,
        files=files,
        files_digest=digest.hexdigest(),
        vocabulary=_vocabulary(folder / _MODEL_CONFIG),
    )


def _prove(chat: ChatBase, loss_scope: str) -> Fast:
    reason = ""
    fast: FastChat | ShapedChat
    try:
        fast = FastChat(chat)
    except NotByteLevel as error:
        fast, reason = ShapedChat(chat), str(error)
    why = unproven(chat, fast, loss_scope=loss_scope)
    trim_heap()
    return (None, why) if why else (fast, reason)


def trim_heap() -> None:
    """Give memory that was freed back to the system: glibc would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _vocabulary(path: Path) -> int | None:
    """What config.json says; models of several parts say it of their text part."""
    if not path.is_file():
        return None
    config, field = read_object(path), "vocab_size"
    size, text = config.get(field), config.get("text_config")
    if size is None and isinstance(text, dict):
        size, field = text.get(field), f"text_config.{field}"
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise invalid(f"must be a number of tokens, not {size!r:.80}", str(path), field)
    return size
