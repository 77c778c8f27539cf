"""What every schema here is: frozen, and strict about names it does not know."""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict

JsonObject: TypeAlias = dict[str, Any]


class Schema(BaseModel):
    """Frozen; unknown keys refused; NaN and infinity leave as null, for JSON has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")
