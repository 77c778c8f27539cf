"""Files, bases, keys and processes: what jobs refer to, and who works on them."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from llamahome.errors import NotFound, Unauthenticated, nearest
from llamahome.ledger.backend import Backend, new_id
from llamahome.ledger.rows import file_view, worker_view
from llamahome.ledger.tables import api_key, base, file, run, worker
from llamahome.schemas import ApiKey, Base, JsonObject, RunState, StoredFile, Worker

KEY_PREFIX = "llh-"
LOST_AFTER_SECONDS = 30.0
FORGET_WORKERS_AFTER_SECONDS = 24 * 3600.0


class Registry(Backend):
    """The statements on everything that is neither a job nor a run."""

    def add_file(
        self, tenant: str, *, filename: str, purpose: str, path: str, sha256: str, bytes: int
    ) -> StoredFile:
        """Register an uploaded file that already lies at ``path`` on shared storage."""
        query = (
            sa.insert(file)
            .values(
                id=new_id("file-"), tenant=tenant, filename=filename, purpose=purpose, path=path,
                sha256=sha256, bytes=bytes, created_at=self.now,
            )
            .returning(file)
        )  # fmt: skip
        return self._write(lambda connection: file_view(connection.execute(query).one()))

    def file(self, file_id: str, tenant: str) -> StoredFile:
        """One file of the tenant. Raises NotFound; another tenant's is not found either."""
        return file_view(self._read(lambda connection: self._file(connection, file_id, tenant)))

    def _file(self, connection: Connection, file_id: str, tenant: str) -> Row[Any]:
        row = connection.execute(
            sa.select(file).where(
                file.c.id == file_id, file.c.tenant == tenant, file.c.deleted_at.is_(None)
            )
        ).one_or_none()
        if row is None:
            raise NotFound(f"No such File object: {file_id}", code="file_not_found", field="id")
        return row

    def find_file(
        self, tenant: str, *, filename: str, purpose: str, sha256: str, since: float
    ) -> StoredFile | None:
        """The newest equal upload made at or after ``since`` (Unix seconds)."""
        query = (
            sa.select(file)
            .where(file.c.tenant == tenant, file.c.filename == filename)
            .where(file.c.purpose == purpose, file.c.sha256 == sha256)
            .where(file.c.deleted_at.is_(None), file.c.created_at >= since)
            .order_by(file.c.created_at.desc())
            .limit(1)
        )
        row = self._read(lambda connection: connection.execute(query).one_or_none())
        return file_view(row) if row is not None else None

    def files(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        newest_first: bool = True,
    ) -> tuple[list[StoredFile], bool]:
        """A page of the tenant's files and whether there is more."""

        def work(connection: Connection) -> tuple[list[StoredFile], bool]:
            place = sa.tuple_(file.c.created_at, file.c.id)
            query = sa.select(file).where(file.c.tenant == tenant, file.c.deleted_at.is_(None))
            if purpose is not None:
                query = query.where(file.c.purpose == purpose)
            if after is not None:
                row = self._file(connection, after, tenant)
                last = sa.tuple_(row.created_at, row.id)
                query = query.where(place < last if newest_first else place > last)
            terms = (file.c.created_at, file.c.id)
            query = query.order_by(*(t.desc() if newest_first else t for t in terms))
            rows = connection.execute(query.limit(limit + 1)).all()
            return [file_view(row) for row in rows[:limit]], len(rows) > limit

        return self._read(work)

    def delete_file(self, file_id: str, tenant: str) -> None:
        """Hide the file from its tenant; jobs accepted with it keep their copy's path."""

        def work(connection: Connection) -> None:
            self._file(connection, file_id, tenant)
            connection.execute(
                sa.update(file).where(file.c.id == file_id).values(deleted_at=self.now)
            )

        self._write(work)

    def add_base(self, name: str, path: str, digest: str) -> Base:
        """Register a base under its public name; the same name again replaces its folder."""

        def work(connection: Connection) -> None:
            values = {"path": path, "digest": digest}
            changed = connection.execute(
                sa.update(base).where(base.c.name == name).values(**values)
            )
            if changed.rowcount == 0:
                connection.execute(sa.insert(base).values(name=name, created_at=self.now, **values))

        self._write(work)
        return self.base(name)

    def base(self, name: str) -> Base:
        """The base of that name. Raises NotFound naming the nearest one."""
        query = sa.select(base).where(base.c.name == name)
        row = self._read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            raise NotFound(
                f"Model {name!r} is not available for fine-tuning or does not exist",
                code="model_not_found", field="model",
                remedy=nearest(name, (known.name for known in self.bases())),
            )  # fmt: skip
        return _base_view(row)

    def bases(self) -> list[Base]:
        query = sa.select(base).order_by(base.c.name)
        rows = self._read(lambda connection: connection.execute(query).all())
        return [_base_view(row) for row in rows]

    def create_key(self, tenant: str) -> ApiKey:
        """A new key for the tenant, valid at once. Only its sha256 is kept.

        A plain digest is enough for 256 random bits: there is no dictionary to try.
        """
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        made = ApiKey(id=new_id("key-"), tenant=tenant, key=key)
        query = sa.insert(api_key).values(
            id=made.id, tenant=tenant, sha256=_digest(key), created_at=self.now
        )
        self._write(lambda connection: connection.execute(query))
        return made

    def tenant_of(self, key: str) -> str:
        """Whose key this is. Raises Unauthenticated."""
        query = sa.select(api_key.c.tenant).where(
            api_key.c.sha256 == _digest(key), api_key.c.revoked_at.is_(None)
        )
        tenant = self._read(lambda connection: connection.execute(query).scalar_one_or_none())
        if tenant is None:
            raise Unauthenticated(
                "Incorrect API key provided", remedy="`llamahome keys create` makes one"
            )
        return str(tenant)

    def heartbeat(
        self,
        worker_id: str,
        *,
        role: str,
        host: str,
        pid: int,
        state: str,
        version: str,
        slots: int,
        metrics_port: int | None,
        info: JsonObject,
    ) -> None:
        """Write this process's row; ``state`` is up, busy, draining, broken or stopped."""

        def work(connection: Connection) -> None:
            values = {
                "state": state, "slots": slots, "metrics_port": metrics_port, "info": info,
                "heartbeat_at": self.now,
            }  # fmt: skip
            changed = connection.execute(
                sa.update(worker).where(worker.c.id == worker_id).values(**values)
            )
            if changed.rowcount == 0:
                connection.execute(
                    sa.insert(worker).values(
                        id=worker_id, role=role, host=host, pid=pid, version=version,
                        started_at=self.now, **values,
                    )
                )  # fmt: skip

        self._write(work)

    def workers(self, *, alive_only: bool = False) -> list[Worker]:
        """Every process heard of in the last day and what it holds; stopped ones are left out."""

        def work(connection: Connection) -> list[Worker]:
            now = float(connection.execute(sa.select(self.now)).scalar_one())
            held: dict[str, list[str]] = {}
            for owner, run_id in connection.execute(
                sa.select(run.c.owner, run.c.id).where(run.c.state == RunState.running)
            ):
                held.setdefault(owner, []).append(run_id)
            rows = connection.execute(
                sa.select(worker)
                .where(worker.c.state != "stopped")
                .where(worker.c.heartbeat_at > now - FORGET_WORKERS_AFTER_SECONDS)
                .order_by(worker.c.role, worker.c.started_at)
            ).all()
            return [
                worker_view(
                    row, now=now, lost_after_seconds=LOST_AFTER_SECONDS, holds=held.get(row.id, ())
                )
                for row in rows
            ]

        seen = self._read(work)
        return [view for view in seen if view.state != "lost"] if alive_only else seen


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _base_view(row: Row[Any]) -> Base:
    return Base(name=row.name, path=row.path, digest=row.digest, created_at=row.created_at)
