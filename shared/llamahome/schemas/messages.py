"""The two messages that ever travel through Redis, both JSON, both versioned.

A doorbell has no content: losing, doubling, delaying or reordering one is harmless. A submission
is the one message with content, and sending it again is harmless (UNIQUE(tenant, submission_id)).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llamahome.schemas.base import JsonObject, Schema


class Doorbell(Schema):
    """ "There may be work on this queue." """

    v: Literal[1] = 1
    queue: str


class SubmitMessage(Schema):
    """The kwargs of the task ``llamahome.submit``.

    ``training_file`` is a file id or an allow-listed URI; ``config`` holds dotted or nested
    training settings.
    """

    v: Literal[1] = 1
    submission_id: str = Field(min_length=1, max_length=128)
    api_key: str = Field(min_length=1, repr=False)
    model: str
    training_file: str
    validation_file: str | None = None
    recipe: str | None = None
    suffix: str | None = None
    config: JsonObject = Field(default_factory=dict)
    metadata: dict[str, str] = Field(default_factory=dict)
