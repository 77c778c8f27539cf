"""A fleet in one process: real ledger (SQLite), real files, stages that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamahome.config import Settings, load_settings
from llamahome.ledger import Ledger
from llamahome.queueing.doorbell import Bell, FaultyBell
from llamahome.queueing.runner import StageRunner
from llamahome.schemas import BaseRef, FileRef, JobSpec, Stage, StageFunction
from llamahome.storage import Storage, open_storage
from support.stages import CountingStage


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(
        state=tmp_path,
        shard_bytes=10,
        lease_seconds=1.0,
        rering_seconds=0.2,
        retry_seconds=0.5,
        host="here",
    )


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    opened = Ledger(settings.ledger)
    opened.upgrade()
    yield opened
    opened.close()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return open_storage(settings.storage)


@pytest.fixture
def stage() -> CountingStage:
    return CountingStage()


@pytest.fixture
def silent_bell() -> Bell:
    return FaultyBell(lambda stage, recover: None, drop_share=0, double_share=0)


@pytest.fixture
def make_runner(
    ledger: Ledger, storage: Storage, settings: Settings, stage: CountingStage, silent_bell: Bell
) -> Callable[..., StageRunner]:
    def make(
        kind: Stage = Stage.validation,
        function: StageFunction | None = None,
        bell: Bell | None = None,
        worker: str = "worker-1",
    ) -> StageRunner:
        return StageRunner(
            kind,
            function or stage.run,
            stage.key,
            ledger=ledger,
            storage=storage,
            bell=bell or silent_bell,
            settings=settings,
            worker=worker,
        )

    return make


@pytest.fixture
def make_spec() -> Callable[..., JobSpec]:
    def make(shards: int = 1, content: str = "a", tenant: str = "acme") -> JobSpec:
        file = FileRef(
            id="file-1", filename="a.jsonl", path=f"uploads/{tenant}/{content}",
            sha256=content * 64, bytes=shards * 10,
        )  # fmt: skip
        return JobSpec(
            tenant=tenant,
            base=BaseRef(name="tiny", path="/bases/tiny", digest="b" * 64),
            training_files=(file,),
            config={},
            shard_bytes=10,
        )

    return make
