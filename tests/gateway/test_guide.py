"""docs/api.md is run: its examples work against a real gateway as they stand."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.gateway import GatewayDeps
from llamahome.queueing.names import SUBMISSIONS_QUEUE, SUBMIT_TASK
from llamahome.schemas import JobState, SubmitMessage

GUIDE = Path(__file__).parents[2] / "docs" / "api.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def example(needle: str) -> str:
    (found,) = [code for code in examples() if needle in code]
    return found


@pytest.fixture
def folder(tmp_path: Path, rows: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the rows that the examples read."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(rows)
    return tmp_path


@pytest.fixture
def worker(
    deps: GatewayDeps, bell: Any, drive: Callable[[str, JobState], Any]
) -> Iterator[threading.Thread]:
    """Brings the first job that is submitted to its end."""

    def work() -> None:
        assert bell.heard.wait(30)
        drive(deps.ledger.jobs("acme")[0][0].id, JobState.succeeded)

    thread = threading.Thread(target=work)
    thread.start()
    yield thread
    thread.join()


def test_the_stock_clients_example_runs(
    folder: Path,
    url: str,
    key: str,
    deps: GatewayDeps,
    worker: threading.Thread,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    names: dict[str, Any] = {}
    exec(example("OpenAI()"), names)
    assert capsys.readouterr().out.startswith("succeeded ft:tiny:acme:support-bot:")
    exec(example("use_rslora"), names)
    newest = deps.ledger.jobs("acme", limit=1)[0][0]
    assert newest.spec.config["lora"]["use_rslora"] is True
    names["client"].close()


def test_our_clients_example_runs(
    folder: Path,
    url: str,
    key: str,
    worker: threading.Thread,
) -> None:
    code = example("client.fetch").replace("http://127.0.0.1:8080", url).replace("llh-...", key)
    exec(code, {})
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_the_fakes_example_runs(folder: Path) -> None:
    exec(example("FakeServer()"), {})


def test_the_celery_message_is_one_that_the_submissions_worker_reads() -> None:
    calls = [node for node in ast.walk(ast.parse(example("Celery("))) if isinstance(node, ast.Call)]
    (send,) = [call for call in calls if ast.unparse(call.func) == "app.send_task"]
    given = {word.arg: ast.literal_eval(word.value) for word in send.keywords}
    assert ast.literal_eval(send.args[0]) == SUBMIT_TASK
    assert given["queue"] == SUBMISSIONS_QUEUE
    assert SubmitMessage.model_validate(given["kwargs"]).submission_id == "nightly-7"


def test_the_codes_that_the_guide_names_are_ones_that_are_answered() -> None:
    """Every code in the table of errors stands in the source of the product."""
    row = next(
        line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| 400")
    )
    root = Path(__file__).parents[2]
    source = "".join(
        path.read_text(encoding="utf-8")
        for below in ("services/llamahome", "shared/llamahome")
        for path in (root / below).rglob("*.py")
    )
    for code in re.findall(r"`(\w+_\w+)`", row):
        assert f'"{code}"' in source, code
