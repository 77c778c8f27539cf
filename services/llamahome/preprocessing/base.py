"""The base's tokenizer and template, read once in a process for as long as its files stay."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import hashlib
import json
from pathlib import Path

from llamahome.conversations.bytelevel import NotByteLevel
from llamahome.conversations.chat import ChatBase
from llamahome.conversations.fastpath import FastChat
from llamahome.conversations.markers import MarkerIds
from llamahome.conversations.proof import unproven
from llamahome.conversations.shaped import ShapedChat
from llamahome.conversations.tokenizer import tokenizer_files
from llamahome.errors import InvalidConfig
from llamahome.schemas import StageTask

_MODEL_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedBase:
    """``vocabulary`` is the model's number of embeddings, None where its config does not say.

    ``markers`` are the marker tokens' ids where the job's template is ``markers``.
    """

    chat: ChatBase
    files: tuple[Path, ...]
    files_digest: str
    vocabulary: int | None

    def fast(self, loss_scope: str) -> tuple[FastChat | ShapedChat | None, str]:
        """The fastest path that was proven for this base and scope, None for the template row by
        row; and why it is no faster one.
        """
        return _fast(self.chat, loss_scope)

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
    state = tuple((path, *_identity(path)) for path in tokenizer_files(folder))
    markers = task.spec.config["template"] == "markers"
    return _load(folder, state, task.plan.get("today"), markers)


def _identity(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _load(
    folder: Path, state: tuple[tuple[Path, int, int], ...], today: str | None, markers: bool
) -> LoadedBase:
    day = datetime.datetime.fromisoformat(today) if today else None
    files = tuple(path for path, _, _ in state)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    chat = ChatBase.load(folder, today=day, markers=markers)
    trim_heap()  # some 80 MB after a vocabulary of 128,000
    return LoadedBase(
        chat=chat,
        files=files,
        files_digest=digest.hexdigest(),
        vocabulary=_vocabulary(folder / _MODEL_CONFIG),
    )


@functools.lru_cache(maxsize=8)
def _fast(chat: ChatBase, loss_scope: str) -> tuple[FastChat | ShapedChat | None, str]:
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
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (ValueError, AttributeError) as error:
        raise InvalidConfig(
            f"cannot be read: {error}", code="invalid_base", file=str(path)
        ) from None
    return int(size) if size is not None else None
