"""What the gateway stands on, handed in once by whoever starts it."""

from __future__ import annotations

import dataclasses

from llamahome.config import Settings
from llamahome.ledger import Ledger
from llamahome.queueing.admission import Admission
from llamahome.storage import Storage


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayDeps:
    ledger: Ledger
    storage: Storage
    admission: Admission
    settings: Settings
