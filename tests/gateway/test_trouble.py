"""What is not the request's fault: a full quota, a ledger that is away, an error of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from llamahome.errors import CorruptArtifact, Unavailable
from llamahome.gateway import GatewayDeps


def test_a_full_quota_is_a_429_that_is_not_retried(
    url: str, key: str, deps: GatewayDeps, put_file: Callable[[str], str]
) -> None:
    tight = deps.settings.model_copy(update={"quota_active_jobs": 1})
    deps.admission._settings = tight  # the running gateway's admission
    file = put_file("acme")
    tries: list[httpx2.Request] = []
    hooks = {"request": [tries.append]}
    with (
        httpx2.Client(event_hooks=hooks) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client,
    ):
        client.fine_tuning.jobs.create(model="tiny", training_file=file)
        with pytest.raises(openai.RateLimitError) as refused:
            client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert refused.value.code == "active_jobs_limit_exceeded"
    assert int(refused.value.response.headers["retry-after"]) > 120
    assert len(tries) == 2


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unavailable("the ledger does not answer", code="ledger_unavailable"), 503,
         "ledger_unavailable"),
        (CorruptArtifact("bytes differ"), 500, "corrupt_artifact"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ],
)  # fmt: skip
def test_trouble_on_our_side_is_a_5xx_in_the_envelope(
    url: str, key: str, http: httpx2.Client, deps: GatewayDeps, monkeypatch: pytest.MonkeyPatch,
    error: Exception, status: int, code: str,
) -> None:  # fmt: skip
    def fail() -> None:
        raise error

    monkeypatch.setattr(deps.ledger, "bases", fail)
    answer = http.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == status
    body = answer.json()["error"]
    assert (body["code"], body["type"]) == (code, "server_error")
    assert "secret" not in answer.text


def test_an_unexpected_error_is_logged_with_the_request_id_that_is_answered(
    url: str,
    key: str,
    http: httpx2.Client,
    deps: GatewayDeps,
    monkeypatch: pytest.MonkeyPatch,
    logs: list[Any],
) -> None:
    def fail() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(deps.ledger, "bases", fail)
    answer = http.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
    request_id = answer.headers["x-request-id"]
    assert request_id in answer.json()["error"]["message"]
    assert [(entry["request"], entry["path"]) for entry in logs] == [(request_id, "/v1/models")]


def test_health_needs_no_key_and_is_503_while_the_ledger_is_away(
    url: str, http: httpx2.Client, deps: GatewayDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http.get(f"{url}/healthz").json() == {"status": "ok"}

    def fail() -> float:
        raise Unavailable("the ledger does not answer", code="ledger_unavailable")

    monkeypatch.setattr(deps.ledger, "clock", fail)
    assert http.get(f"{url}/healthz").status_code == 503
