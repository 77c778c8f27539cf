"""The OpenAPI document, frozen in tests/gateway/openapi.json.

After a change that is meant: ``python -m llamahome.gateway.openapi > tests/gateway/openapi.json``.
"""

from __future__ import annotations

import json
import sys

from llamahome.gateway.app import surface


def document() -> str:
    """The document as JSON text, with sorted keys and a newline at the end."""
    return json.dumps(surface().openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
