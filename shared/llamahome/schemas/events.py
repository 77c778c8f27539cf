"""What a job tells its watchers, oldest first by ``seq``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llamahome.schemas.base import JsonObject, Schema


class Event(Schema):
    """One line of a job's story. ``created_at`` is Unix seconds by the ledger's clock."""

    seq: int
    job_id: str
    run_id: str | None
    created_at: float
    level: Literal["info", "warn", "error"]
    kind: Literal["message", "metrics"]
    message: str
    data: JsonObject = Field(default_factory=dict)


class NewEvent(Schema):
    """An event on its way into the ledger, which gives it its number and time."""

    message: str
    level: Literal["info", "warn", "error"] = "info"
    kind: Literal["message", "metrics"] = "message"
    data: JsonObject = Field(default_factory=dict)
