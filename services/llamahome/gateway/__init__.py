"""The HTTP door: OpenAI's fine-tuning API over the ledger.

``create_app`` makes the ASGI app, ``llamahome.gateway.worker.main`` runs it as a process.
"""

from llamahome.gateway.app import create_app
from llamahome.gateway.deps import GatewayDeps

__all__ = ["GatewayDeps", "create_app"]
