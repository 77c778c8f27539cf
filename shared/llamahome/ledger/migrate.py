"""Schema migrations (Alembic), run from the package: a wheel has no alembic.ini."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from llamahome.errors import InvalidState
from llamahome.ledger.backend import Backend

_FOLDER = Path(__file__).with_name("migrations")


class Migrations(Backend):
    """Bring the schema up to date, and say whether it is."""

    def upgrade(self) -> None:
        """Create or migrate the schema; a no-op when current. Safe to run in several processes."""

        def work(connection: Connection) -> None:
            with self._unhurried(connection):
                if not self.sqlite:
                    # Held until the transaction ends; SQLite's write lock does the same there.
                    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(720104261)")
                command.upgrade(_config(connection), "head")

        self._write(work)

    def revision(self) -> str | None:
        """The schema's revision; None for an empty database."""
        return self._read(
            lambda connection: MigrationContext.configure(connection).get_current_revision()
        )

    def check_revision(self) -> None:
        """Raises InvalidState when the schema is not the one this version was written for."""
        found, head = self.revision(), head_revision()
        if found != head:
            raise InvalidState(
                f"the ledger {self.describe()} has schema {found}, this version needs {head}",
                code="ledger_schema",
                remedy="Run `llamahome ledger upgrade`",
            )


def head_revision() -> str | None:
    return ScriptDirectory(str(_FOLDER)).get_current_head()


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
