"""What the gateway refuses, and how it says so."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest


@pytest.fixture(scope="module")
def refusing(
    tmp_path_factory: pytest.TempPathFactory, start_gateway: Callable[[Path], Any]
) -> Iterator[tuple[Any, str, str]]:
    """One gateway for all that is refused: (app, key, id of an uploaded file)."""
    with start_gateway(tmp_path_factory.mktemp("state")) as (app, deps):
        file = deps.admission.store_upload(
            "acme", filename="rows.jsonl", purpose="fine-tune", stream=io.BytesIO(b"{}\n")
        )
        yield app, deps.ledger.create_key("acme").key, file.id


@pytest.fixture
def door(refusing: tuple[Any, str, str], served: tuple[str, Any]) -> tuple[str, str, str]:
    """(URL, key, file id), with that gateway behind the URL."""
    app, key, file_id = refusing
    served[1].app = app
    return served[0], key, file_id


@pytest.fixture
def post(door: tuple[str, str, str], http: httpx2.Client) -> Callable[..., httpx2.Response]:
    """POST of a job whose body is valid but for what is given."""
    url, key, file_id = door

    def do(**body: Any) -> httpx2.Response:
        return http.post(
            f"{url}/v1/fine_tuning/jobs",
            json={"model": "tiny", "training_file": file_id, **body},
            headers={"authorization": f"Bearer {key}"},
        )

    return do


@pytest.fixture
def ask(door: tuple[str, str, str], http: httpx2.Client) -> Callable[..., httpx2.Response]:
    """Any request with a valid key."""
    url, key, _ = door

    def do(method: str, path: str, **request: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}", **request.pop("headers", {})}
        return http.request(method, url + path, headers=headers, **request)

    return do


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The envelope's content; that there is nothing else in it is checked for every error."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    error: dict[str, Any] = body["error"]
    return error


HYPER = "hyperparameters"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"modle": "tiny"}, "unknown_parameter", "modle"),
        ({HYPER: {"epochs": 3}}, "unknown_parameter", f"{HYPER}.epochs"),
        ({"method": {"type": "supervised", "supervised": {"hyper": {}}}}, "unknown_parameter",
         "method.supervised.hyper"),
        ({HYPER: {"n_epochs": True}}, "invalid_value", f"{HYPER}.n_epochs"),
        ({HYPER: {"n_epochs": 1.5}}, "invalid_value", f"{HYPER}.n_epochs"),
        ({HYPER: {"n_epochs": "3"}}, "invalid_value", f"{HYPER}.n_epochs"),
        ({HYPER: {"n_epochs": 0}}, "invalid_value", f"{HYPER}.n_epochs"),
        ({HYPER: {"n_epochs": 51}}, "invalid_value", f"{HYPER}.n_epochs"),
        ({HYPER: {"batch_size": 257}}, "invalid_value", f"{HYPER}.batch_size"),
        ({HYPER: {"batch_size": False}}, "invalid_value", f"{HYPER}.batch_size"),
        ({HYPER: {"learning_rate_multiplier": 0}}, "invalid_value",
         f"{HYPER}.learning_rate_multiplier"),
        ({HYPER: {"learning_rate_multiplier": True}}, "invalid_value",
         f"{HYPER}.learning_rate_multiplier"),
        ({HYPER: {"learning_rate_multiplier": 10**400}}, "invalid_value",
         f"{HYPER}.learning_rate_multiplier"),
        ({HYPER: {"lora_alpha": 10**400}}, "invalid_value", f"{HYPER}.lora_alpha"),
        ({"config": {"learning_rate": 10**400}}, "invalid_value", "config.learning_rate"),
        ({"config": {"lora": {"alpha": 2e6}}}, "invalid_value", "config.lora.alpha"),
        ({HYPER: {"lora_dropout": 1}}, "invalid_value", f"{HYPER}.lora_dropout"),
        ({HYPER: {"learning_rate": 1e-4, "learning_rate_multiplier": 2}}, "invalid_value",
         f"{HYPER}.learning_rate_multiplier"),
        ({HYPER: {"n_epochs": 2}, "config": {"epochs": 3}}, "invalid_value", f"{HYPER}.n_epochs"),
        ({HYPER: {"n_epochs": 2}, "method": {"type": "supervised", "supervised":
          {HYPER: {"n_epochs": 3}}}}, "invalid_value", HYPER),
        ({"method": {"type": "dpo", "dpo": {}}}, "unsupported_method", "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "unsupported_method", "method.dpo"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
         "unsupported_parameter", "integrations"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"seed": True}, "invalid_value", "seed"),
        ({"suffix": ""}, "invalid_value", "suffix"),
        ({"suffix": "x" * 65}, "invalid_value", "suffix"),
        ({"metadata": {"k": 1}}, "invalid_value", "metadata.k"),
        ({"metadata": {"k" * 65: "v"}}, "invalid_value", "metadata"),
        ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "invalid_value", "metadata"),
        ({"config": {"epoch": 3}}, "unknown_parameter", "config.epoch"),
        ({"config": {"lora": {"rank": 8}}}, "unknown_parameter", "config.lora.rank"),
        ({"config": {"epochs": 0}}, "invalid_value", "config.epochs"),
        ({"config": 5}, "invalid_value", "config"),
        ({"recipe": "nonesuch"}, "unknown_recipe", "recipe"),
        ({"submission_id": "request-body:x"}, "invalid_value", "submission_id"),
        ({"model": "nonesuch"}, "model_not_found", "model"),
        ({"model": "ft:tiny:acme::1"}, "model_not_found", "model"),
        ({"model": None}, "invalid_value", "model"),
        ({"training_file": "file-nonesuch"}, "file_not_found", "training_file"),
        ({"validation_file": "file-nonesuch"}, "file_not_found", "validation_file"),
        ({"training_file": "file:///etc/passwd"}, "uri_not_allowed", "training_file"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_a_400_that_names_it(
    post: Callable[..., httpx2.Response], body: dict[str, Any], code: str, param: str
) -> None:
    answer = post(**body)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"


def test_a_mistyped_name_is_answered_with_the_nearest_one(
    post: Callable[..., httpx2.Response],
) -> None:
    assert "Did you mean 'suffix'?" in error_of(post(sufix="x"))["message"]
    assert "Did you mean 'n_epochs'?" in error_of(post(hyperparameters={"epochs": 1}))["message"]
    assert "Did you mean 'epochs'?" in error_of(post(config={"epoch": 1}))["message"]


def test_a_missing_field_is_named(ask: Callable[..., httpx2.Response]) -> None:
    answer = ask("POST", "/v1/fine_tuning/jobs", json={"model": "tiny"})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "missing_required_parameter")
    assert error["param"] == "training_file"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"text"', b"null"]
)
def test_a_body_that_is_no_object_is_a_400(
    ask: Callable[..., httpx2.Response], content: bytes
) -> None:
    headers = {"content-type": "application/json"}
    answer = ask("POST", "/v1/fine_tuning/jobs", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert "None:" not in error_of(answer)["message"]


@pytest.mark.parametrize("text", ["\x00", "\ud800"])
@pytest.mark.parametrize("place", ["metadata", "config", "suffix", "key"])
def test_text_that_cannot_be_stored_is_a_400(
    ask: Callable[..., httpx2.Response], text: str, place: str
) -> None:
    body: dict[str, Any] = {"model": "tiny", "training_file": "file-x"}
    spoiled: dict[str, dict[str, Any]] = {
        "metadata": {"metadata": {"k": text}},
        "config": {"config": {"lora": {"target_modules": [text]}}},
        "suffix": {"suffix": text},
        "key": {text: 1},
    }
    body |= spoiled[place]
    headers = {"content-type": "application/json"}
    answer = ask("POST", "/v1/fine_tuning/jobs", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    assert "cannot be stored" in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/models/a%00", "/v1/files?after=%00"])
def test_a_nul_in_the_url_is_a_400(ask: Callable[..., httpx2.Response], path: str) -> None:
    assert ask("GET", path).status_code == 400


def test_a_body_over_a_megabyte_is_a_413(post: Callable[..., httpx2.Response]) -> None:
    answer = post(config={"x": "y" * 2_000_000})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_no_key_and_a_wrong_key_are_a_401(door: tuple[str, str, str], http: httpx2.Client) -> None:
    url = door[0]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}):
        answer = http.get(f"{url}/v1/models", headers=headers)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/uploads"),
        ("GET", "/v1/webhook_endpoints"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models/"),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
def test_an_unknown_route_is_a_404_in_the_envelope(
    ask: Callable[..., httpx2.Response], method: str, path: str
) -> None:
    answer = ask(method, path)
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_method_that_is_not_offered_is_a_405(ask: Callable[..., httpx2.Response]) -> None:
    answer = ask("DELETE", "/v1/models/tiny")
    assert answer.status_code == 405
    assert error_of(answer)["code"] == "method_not_allowed"
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limt=5", "unknown_parameter", "limt"),
        ("limit=0", "invalid_value", "limit"),
        ("limit=abc", "invalid_value", "limit"),
        ("after=ftjob-nonesuch", "invalid_cursor", "after"),
        ("metadata=x", "invalid_value", "metadata"),
    ],
)
def test_a_wrong_query_is_a_400(
    ask: Callable[..., httpx2.Response], query: str, code: str, param: str
) -> None:
    answer = ask("GET", f"/v1/fine_tuning/jobs?{query}")
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)


def test_a_wrong_event_cursor_is_a_400(stock: openai.OpenAI, submit: Callable[..., str]) -> None:
    job_id = submit()
    for after in ("ftjob-1", "ftevent-", "ftevent-x", "ftevent-" + "9" * 30):
        with pytest.raises(openai.BadRequestError) as refused:
            stock.fine_tuning.jobs.list_events(job_id, after=after)
        assert refused.value.code == "invalid_cursor"


def test_a_file_for_another_purpose_cannot_be_trained_on(stock: openai.OpenAI) -> None:
    file = stock.files.create(file=("rows.jsonl", b"{}\n"), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as refused:
        stock.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert refused.value.param == "training_file"
    assert "user_data" in refused.value.message


def test_missing_objects_are_404_with_openais_codes(stock: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as job:
        stock.fine_tuning.jobs.retrieve("ftjob-nonesuch")
    assert (job.value.code, job.value.param) == ("fine_tune_not_found", "fine_tune_id")
    assert "Could not find fine tune: ftjob-nonesuch" in job.value.message
    with pytest.raises(openai.NotFoundError) as file:
        stock.files.retrieve("file-nonesuch")
    assert file.value.param == "id"
    assert "No such File object: file-nonesuch" in file.value.message
    for name in ("nonesuch", "ft:tiny:acme::nonesuch", "Qwen/Qwen3-0.6B"):
        with pytest.raises(openai.NotFoundError) as model:
            stock.models.retrieve(name)
        assert model.value.code == "model_not_found"
