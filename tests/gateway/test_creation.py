"""A job is made once, however often its request arrives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from llamahome.gateway import GatewayDeps
from llamahome.gateway.creation import KeyedLocks
from llamahome.ledger import Ledger

Send = Callable[..., httpx2.Response]


@pytest.fixture
def send(url: str, key: str, http: httpx2.Client, upload: Callable[[], str]) -> Send:
    """POST of one fixed body, with the headers given and the fields replaced."""
    file_id = upload()

    def do(headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
        return http.post(
            f"{url}/v1/fine_tuning/jobs",
            json={"model": "tiny", "training_file": file_id, **body},
            headers={"authorization": f"Bearer {key}", **(headers or {})},
        )

    return do


def retry(count: int) -> dict[str, str]:
    return {"x-stainless-retry-count": str(count)}


def test_a_retry_of_the_stock_client_answers_the_first_job(send: Send, deps: GatewayDeps) -> None:
    first = send(retry(0))
    for count in (1, 2):
        again = send(retry(count))
        assert again.json()["id"] == first.json()["id"]
        assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(deps.ledger.jobs("acme")[0]) == 1


def test_equal_creates_that_are_meant_are_two_jobs(send: Send) -> None:
    first, second, third = (send(retry(0)).json()["id"] for _ in range(3))
    assert len({first, second, third}) == 3
    # A retry belongs to the newest of them.
    assert send(retry(1)).json()["id"] == third


def test_a_retry_whose_first_try_never_arrived_makes_the_job(send: Send) -> None:
    made = send(retry(1))
    assert made.status_code == 200
    assert "idempotent-replayed" not in made.headers
    assert send(retry(2)).json()["id"] == made.json()["id"]


def test_a_retry_with_another_body_is_another_job(send: Send) -> None:
    assert send(retry(0)).json()["id"] != send(retry(1), suffix="b").json()["id"]


def test_a_retry_is_remembered_for_ten_minutes_across_the_window(
    send: Send, deps: GatewayDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's idea of now is moved: 590 s later is the next window, and still in time."""
    first = send(retry(0)).json()["id"]
    real = Ledger.clock
    monkeypatch.setattr(Ledger, "clock", lambda self: real(self) + 590)
    assert send(retry(1)).json()["id"] == first
    monkeypatch.setattr(Ledger, "clock", lambda self: real(self) + 1300)
    assert send(retry(1)).json()["id"] != first


def test_many_equal_creates_at_once_are_as_many_jobs(send: Send) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {answer.json()["id"] for answer in pool.map(lambda _: send(retry(0)), range(12))}
    assert len(ids) == 12
    assert send(retry(1)).json()["id"] in ids


def test_a_retry_waits_for_a_first_try_that_is_still_being_handled(
    send: Send, deps: GatewayDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, go_on = threading.Event(), threading.Event()
    submit = deps.admission.submit

    def slow(*args: Any, **kwargs: Any) -> Any:
        arrived.set()
        assert go_on.wait(10)
        return submit(*args, **kwargs)

    monkeypatch.setattr(deps.admission, "submit", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(send, retry(0))
        assert arrived.wait(10)
        again = pool.submit(send, retry(1))
        assert not again.done()
        go_on.set()
        assert again.result().json()["id"] == first.result().json()["id"]
    assert len(deps.ledger.jobs("acme")[0]) == 1


def test_the_stock_client_makes_one_job_when_an_answer_is_lost(
    url: str, key: str, upload: Callable[[], str], deps: GatewayDeps
) -> None:
    """The same bytes with the retry count raised: seen here as the client really sends them."""
    file_id = upload()

    class LosesFirstAnswer(httpx2.HTTPTransport):
        lost = 0

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().handle_request(request)
            if self.lost == 0:
                self.lost += 1
                answer.read()
                answer.close()
                raise httpx2.ReadError("lost", request=request)
            return answer

    http = httpx2.Client(transport=LosesFirstAnswer())
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client:
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert [made.id for made in deps.ledger.jobs("acme")[0]] == [job.id]


@pytest.mark.parametrize(
    "repeatable", [{"headers": {"idempotency-key": "k-1"}}, {"submission_id": "s-1"}]
)
def test_a_key_or_submission_id_names_one_job(send: Send, repeatable: dict[str, Any]) -> None:
    first = send(**repeatable)
    again = send(**repeatable)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"

    for other in ({"suffix": "b"}, {"config": {"epochs": 1}}, {"metadata": {"k": "v"}}):
        refused = send(**repeatable, **other)
        assert refused.status_code == 409
        assert refused.headers["x-should-retry"] == "false"
        assert refused.json()["error"]["code"] == "idempotency_key_reuse"


def test_the_same_content_uploaded_again_is_the_same_request(
    send: Send, stock: openai.OpenAI, upload: Callable[[], str]
) -> None:
    first = send(submission_id="s-1")
    assert send(submission_id="s-1", training_file=upload()).json()["id"] == first.json()["id"]
    other = stock.files.create(file=("other.jsonl", b"{}\n"), purpose="fine-tune").id
    assert send(submission_id="s-1", training_file=other).status_code == 409


def test_a_submission_id_belongs_to_its_tenant(
    send: Send, stranger: openai.OpenAI, put_file: Callable[[str], str]
) -> None:
    mine = send(submission_id="s-1").json()["id"]
    theirs = stranger.fine_tuning.jobs.create(
        model="tiny", training_file=put_file("rival"), extra_body={"submission_id": "s-1"}
    )
    assert theirs.id != mine


def test_a_repeated_request_is_answered_even_at_a_full_quota(send: Send, deps: GatewayDeps) -> None:
    first = send(submission_id="s-1").json()["id"]
    tight = deps.settings.model_copy(update={"quota_active_jobs": 1})
    deps.admission._settings = tight  # the running gateway's admission
    assert send(submission_id="s-1").json()["id"] == first
    assert send(submission_id="s-2").status_code == 429


def test_ids_that_the_gateway_makes_itself_are_not_shown(send: Send) -> None:
    assert send(retry(0)).json()["x_submission_id"] is None
    assert send({"idempotency-key": "k"}, suffix="k").json()["x_submission_id"] is None
    assert send(submission_id="mine").json()["x_submission_id"] == "mine"


def test_a_lock_is_forgotten_once_nobody_holds_it() -> None:
    locks = KeyedLocks()
    with locks.holding("a"), locks.holding("b"):
        assert set(locks._held) == {"a", "b"}
    assert locks._held == {}
