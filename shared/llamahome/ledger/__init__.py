"""The ledger: the one truth about jobs, runs, leases, fences and artifacts. Redis only rings.

``Ledger(url)`` answers on SQLite (one host) and PostgreSQL (a fleet) with the same statements,
held together by one conformance suite (``tests/ledger``).
"""

from llamahome.ledger.claims import Claim
from llamahome.ledger.facts import Facts
from llamahome.ledger.migrate import Migrations
from llamahome.ledger.registry import Registry
from llamahome.ledger.repair import Repairs
from llamahome.ledger.sweep import Ring, Sweeping

__all__ = ["Claim", "Ledger", "Ring"]


class Ledger(Repairs, Sweeping, Registry, Facts, Migrations):
    """Everything that may be said to and asked of the ledger.

    One per process: connections do not survive a fork. Every method is one transaction and
    raises Unavailable when the database does not answer.
    """
