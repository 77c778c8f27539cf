"""The HTTP surface is frozen: a change of it is a change of this snapshot, made on purpose."""

from __future__ import annotations

import json
from pathlib import Path

from llamahome.gateway.openapi import document

SNAPSHOT = Path(__file__).with_name("openapi.json")


def test_the_openapi_document_is_the_committed_one() -> None:
    assert document() == SNAPSHOT.read_text(encoding="utf-8"), (
        "run: python -m llamahome.gateway.openapi > tests/gateway/openapi.json"
    )


def test_every_route_but_health_asks_for_a_key() -> None:
    paths = json.loads(document())["paths"]
    without_key = {
        (method, path)
        for path, operations in paths.items()
        for method, operation in operations.items()
        if not operation.get("security")
    }
    assert without_key == {("get", "/healthz")}
