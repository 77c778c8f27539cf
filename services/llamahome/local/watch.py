"""Who is told what while a job runs here, and who may stop it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llamahome.local.ports import ShouldStop
from llamahome.schemas import NewEvent, Stage


@dataclasses.dataclass(frozen=True)
class Watch:
    """Who is told what while files are trained on; every part may be left out."""

    event: Callable[[Stage, NewEvent], None] | None = None
    progress: Callable[[Stage, int, int | None, Mapping[str, Any]], None] | None = None
    should_stop: ShouldStop | None = None

    def warn(self, message: str) -> None:
        if self.event is not None:
            self.event(Stage.training, NewEvent(message=message, level="warn"))
