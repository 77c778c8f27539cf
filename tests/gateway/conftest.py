"""A real gateway on loopback, over a real ledger and storage in the test's own folder."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import structlog
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from llamahome.client import Client
from llamahome.config import Settings
from llamahome.gateway import GatewayDeps, create_app
from llamahome.ledger import Claim, Ledger
from llamahome.queueing.admission import Admission
from llamahome.schemas import (
    ArtifactRef,
    JobReport,
    JobState,
    PreparationReport,
    SplitCounts,
    Stage,
    StageResult,
    Step,
    TrainingMetrics,
    TrainingReport,
    ValidationReport,
)
from llamahome.storage import Storage, artifact_path, model_path, open_storage

ROW = {
    "messages": [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
    ]
}
LORA = {"r": 6, "lora_alpha": 12, "target_modules": ["v_proj", "q_proj"], "use_rslora": True}
STAGE_OF = {
    JobState.accepted: Stage.validation,
    JobState.validating: Stage.validation,
    JobState.preparing: Stage.preprocessing,
    JobState.queued: Stage.training,
    JobState.running: Stage.training,
}


Gateway = contextlib.AbstractContextManager[tuple[ASGIApp, GatewayDeps]]


class CountingBell:
    """Notes that somebody rang; waking is not what these tests are about."""

    def __init__(self) -> None:
        self.rung: list[Stage] = []
        self.heard = threading.Event()

    def ring(self, stage: Stage, *, count: int = 1, recover: bool = False) -> None:
        self.rung.append(stage)
        self.heard.set()


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated ledger to copy: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite3"
    ledger = Ledger(f"sqlite:///{path}")
    ledger.upgrade()
    ledger.close()
    return path


class Door:
    """The one server of the session; each test puts its own app behind it."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def start_gateway(empty_ledger: Path) -> Callable[[Path], Gateway]:
    """A gateway over a given folder: ``with start_gateway(folder) as (app, deps)``."""

    @contextlib.contextmanager
    def start(state: Path) -> Iterator[tuple[ASGIApp, GatewayDeps]]:
        shutil.copy(empty_ledger, state / "ledger.sqlite3")
        settings = Settings(state=state, max_file_bytes=1_000_000)
        ledger = Ledger(settings.ledger)
        ledger.add_base("tiny", "/bases/tiny", "0" * 64)
        storage = open_storage(settings.storage)
        admission = Admission(ledger, storage, settings, CountingBell())
        deps = GatewayDeps(ledger, storage, admission, settings)
        with contextlib.closing(ledger):
            yield create_app(deps), deps

    return start


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[str, Door]]:
    """A real server on a free port of loopback, in a thread."""
    door = Door()
    config = uvicorn.Config(door, log_config=None, lifespan="off", ws="none", access_log=False)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)  # connections wait here until the server accepts them
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", door
        server.should_exit = True
        thread.join()


@pytest.fixture
def bell(deps: GatewayDeps) -> CountingBell:
    bell = deps.admission._bell
    assert isinstance(bell, CountingBell)
    return bell


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """What the gateway logged in this test."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def deps(
    tmp_path: Path,
    start_gateway: Callable[[Path], Gateway],
    served: tuple[str, Door],
) -> Iterator[GatewayDeps]:
    """What the test's gateway stands on; it is served at ``url`` while the test runs."""
    state = tmp_path / "state"
    state.mkdir()
    with start_gateway(state) as (app, parts):
        served[1].app = app
        yield parts


@pytest.fixture
def url(served: tuple[str, Door], deps: GatewayDeps) -> str:
    """The gateway's URL, without /v1."""
    return served[0]


@pytest.fixture
def key(deps: GatewayDeps) -> str:
    return deps.ledger.create_key("acme").key


@pytest.fixture(scope="session")
def http() -> Iterator[httpx2.Client]:
    """One client for all tests: making one reads the certificates of the machine."""
    with httpx2.Client(timeout=30) as client:
        yield client


@pytest.fixture
def stock(url: str, key: str, http: httpx2.Client) -> openai.OpenAI:
    """The stock client, as a tenant's service would make it."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http)


@pytest.fixture
def strict(url: str, key: str, http: httpx2.Client) -> openai.OpenAI:
    """The stock client, refusing whatever is not in its own schema."""
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http,
        _strict_response_validation=True,
    )  # fmt: skip


@pytest.fixture
def stranger(url: str, deps: GatewayDeps, http: httpx2.Client) -> openai.OpenAI:
    """The stock client with another tenant's key."""
    other = deps.ledger.create_key("rival").key
    return openai.OpenAI(base_url=f"{url}/v1", api_key=other, max_retries=0, http_client=http)


@pytest.fixture
def ours(url: str, key: str) -> Iterator[Client]:
    with Client(url, key, retries=0) as client:
        yield client


@pytest.fixture
def rows() -> bytes:
    """Twelve conversations, as JSON lines."""
    return b"".join(json.dumps({**ROW, "n": n}).encode() + b"\n" for n in range(12))


@pytest.fixture
def upload(stock: openai.OpenAI, rows: bytes) -> Callable[[], str]:
    def do() -> str:
        return stock.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id

    return do


@pytest.fixture
def submit(stock: openai.OpenAI, upload: Callable[[], str]) -> Callable[..., str]:
    """Creates a job with the stock client; returns its id."""

    def do(**body: Any) -> str:
        given = {"model": "tiny", "training_file": upload(), **body}
        return stock.fine_tuning.jobs.create(**given).id

    return do


@pytest.fixture
def drive(deps: GatewayDeps, tmp_path: Path) -> Callable[[str, JobState], Claim | None]:
    """Moves the only waiting job on until it is in a state, as workers would.

    Returns the claim that is still held in that state, if one is.
    """
    held: dict[str, Claim] = {}

    def do(job_id: str, state: JobState) -> Claim | None:
        while (job := deps.ledger.job(job_id)).state is not state:
            if job_id in held:
                claim = held.pop(job_id)
                deps.ledger.complete(claim, _result(claim, deps.storage, tmp_path))
                continue
            taken = deps.ledger.claim(
                STAGE_OF[job.state], "worker-1", host="host-1", pid=1, lease_seconds=30
            )
            assert taken is not None, f"nothing to claim for {job_id} in {job.state}"
            held[job_id] = taken
        return held.get(job_id)

    return do


def _result(claim: Claim, storage: Storage, tmp_path: Path) -> StageResult:
    task = claim.task
    where = (task.stage, task.step)
    if where == (Stage.validation, Step.shard):
        rejected = {"file": "rows.jsonl", "line": 3, "code": "bad_json", "reason": "no JSON"}
        content = {"rejected.jsonl": json.dumps(rejected).encode() + b"\n"}
        artifact = _publish(storage, tmp_path, claim, "rows", content)
        summary = {"split": task.plan["split"], "index": task.plan["file"], "lines": 10}
        return StageResult(artifact=artifact, summary=summary)
    if where == (Stage.validation, Step.close):
        return StageResult(next_plans=({"split": "training", "rows": 0, "index": 0},))
    if task.stage is Stage.training:
        config = json.dumps({"peft_type": "LORA", **LORA}).encode()
        content = {"adapter_model.safetensors": b"weights", "adapter_config.json": config}
        adapter = _publish(storage, tmp_path, claim, "adapter", content)
        summary = {"trained_tokens": 345, "report": _report(task.job_id).model_dump(mode="json")}
        return StageResult(artifact=adapter, summary=summary)
    return StageResult()


def _publish(
    storage: Storage, tmp_path: Path, claim: Claim, kind: str, content: dict[str, bytes]
) -> ArtifactRef:
    folder = tmp_path / f"made-{claim.run_id}"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    adapter = kind == "adapter"
    path = model_path(claim.task.job_id, claim.fence) if adapter else artifact_path(claim.run_id)
    return storage.publish(folder, path, kind=kind)


def _report(job_id: str) -> JobReport:
    metrics = TrainingMetrics(train_loss=0.5, eval_loss=None, learning_rate=0.0, epoch=3, step=9)
    return JobReport(
        job_id=job_id,
        base="tiny",
        validation=ValidationReport(files=(), total=0, valid=0, invalid={}, duplicates=0),
        preparation=PreparationReport(
            rows_in=12, training=SplitCounts(rows=11), validation=SplitCounts(rows=1)
        ),
        training=TrainingReport(
            steps=9, epochs=3, seed=42, eval_loss_before=None, eval_loss_after=None,
            trained_tokens=345, trainable_parameters=1, base_unchanged=True, adapter_moved=True,
            precision="fp32", mode="fast", metrics=metrics,
        ),
        lineage={"data": "0" * 64},
    )  # fmt: skip


@pytest.fixture
def put_file(deps: GatewayDeps) -> Callable[[str], str]:
    """A file of a tenant, without HTTP; returns its id."""

    def do(tenant: str) -> str:
        return deps.admission.store_upload(
            tenant, filename="rows.jsonl", purpose="fine-tune", stream=io.BytesIO(b"{}\n")
        ).id

    return do
