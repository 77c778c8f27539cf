"""Whatever is sent, the answer is the request's result or a 4xx in OpenAI's envelope."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamahome.config import TrainingConfig
from llamahome.gateway.requests import KNOWN_FIELDS

JOBS = "/v1/fine_tuning/jobs"
KEYS = sorted(
    {name for fields in KNOWN_FIELDS.values() for name in fields}
    | set(TrainingConfig.model_fields)
    | {"r", "alpha", "target_modules", "enabled", "max_line_bytes", "type", "wandb"}
)
LISTS = [JOBS, "/v1/files", "/v1/models", "/v1/fleet/workers", "JOB", "JOB/events",
         "JOB/checkpoints", "JOB/runs", "JOB/artifacts", "JOB/report", "JOB/quarantine",
         "/v1/files/FILE", "/v1/files/FILE/content", "/healthz"]  # fmt: skip
QUERY = ["limit", "after", "order", "purpose", "metadata", "metadata[k]", "submission_id", "limt"]
MOVES = ["cancel", "pause", "resume", "retry", "nonesuch"]

texts = st.one_of(
    st.sampled_from(
        [
            "",
            "auto",
            "tiny",
            "JOB",
            "FILE",
            "supervised",
            "all-linear",
            "null",
            "\x00",
            "\ud800",
            "a\x00b",
            "../../etc/passwd",
            "file:///etc/passwd",
            "ft:tiny:acme::x",
            "x" * 70,
            "1e999",
            "request-body:x",
            "١٢",
            "NaN",
            "ftevent-1",
            "ftevent-" + "9" * 40,
        ]
    ),  # fmt: skip
    st.text(max_size=12),
    st.text(st.characters(categories=["Cs", "Cc", "Co", "Nd"]), max_size=4),
)
numbers = st.one_of(
    st.integers(), st.floats(),
    st.sampled_from([0, -1, True, 10**18, 2**63, -(2**63) - 1, 2**200, 10**400, 1e308, 5e-324]),
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
names = st.one_of(st.sampled_from(KEYS), texts)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
bodies = st.fixed_dictionaries(
    {"model": st.just("tiny") | values, "training_file": st.just("FILE") | values},
    optional={key: values for key in set(KNOWN_FIELDS[()]) - {"model", "training_file"}}
    | {
        "hyperparameters": st.dictionaries(
            st.sampled_from(KNOWN_FIELDS[("hyperparameters",)]), leaves, max_size=3
        ),
        "method": st.fixed_dictionaries(
            {"type": st.just("supervised") | values},
            optional={"supervised": values, "dpo": values},
        ),
        "config": st.dictionaries(st.sampled_from(sorted(TrainingConfig.model_fields)), values,
                                  max_size=3),
    },
)  # fmt: skip
deep = st.builds(
    lambda depth, opening: _deep(opening, depth),
    st.sampled_from([10, 100, 900, 1100, 5000, 100_000]),
    st.sampled_from(["[", '{"config":', '{"a":[']),
)
raw = st.one_of(st.binary(max_size=40), deep)

fuzzed = settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def _deep(opening: str, depth: int) -> bytes:
    closing = {"[": "]", '{"config":': "}", '{"a":[': "]}"}[opening]
    return (opening * depth + "1" + closing * depth).encode()


class Asker:
    """Sends anything with a valid key, and holds every answer to the promise."""

    def __init__(self, http: httpx2.Client, url: str, key: str, file_id: str) -> None:
        self._http, self._url = http, url
        self._headers = {"authorization": f"Bearer {key}"}
        made = http.post(
            url + JOBS, json={"model": "tiny", "training_file": file_id}, headers=self._headers
        )
        assert made.status_code == 200, made.text
        self._ids = {"JOB": str(made.json()["id"]), "FILE": file_id}

    def __call__(self, method: str, path: str, **request: Any) -> None:
        path = path.replace("JOB", f"{JOBS}/{self._ids['JOB']}").replace("FILE", self._ids["FILE"])
        headers = {**self._headers, **request.pop("headers", {})}
        answer = self._http.request(method, self._url + path, headers=headers, **request)
        assert answer.status_code < 500, f"{method} {path}: {answer.text}"
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            assert error["code"]

    def json(self, value: Any) -> bytes:
        """Halves of surrogate pairs, NaN and all; JOB and FILE become ids."""
        text = json.dumps(value)
        for name, known in self._ids.items():
            text = text.replace(f'"{name}"', f'"{known}"')
        return text.encode()


@pytest.fixture(scope="module")
def there(
    tmp_path_factory: pytest.TempPathFactory,
    start_gateway: Callable[[Path], Any],
    served: tuple[str, Any],
    http: httpx2.Client,
) -> Iterator[tuple[Any, Asker]]:
    """One gateway for all that is sent."""
    with start_gateway(tmp_path_factory.mktemp("state")) as (app, deps):
        file = deps.admission.store_upload(
            "acme", filename="rows.jsonl", purpose="fine-tune", stream=io.BytesIO(b"{}\n")
        )
        served[1].app = app
        yield app, Asker(http, served[0], deps.ledger.create_key("acme").key, file.id)


@pytest.fixture
def ask(there: tuple[Any, Asker], served: tuple[str, Any]) -> Asker:
    app, asker = there
    served[1].app = app
    return asker


JSON = {"content-type": "application/json"}


@fuzzed
@given(body=bodies)
def test_a_job_of_anything(ask: Asker, body: dict[str, Any]) -> None:
    ask("POST", JOBS, content=ask.json(body), headers=JSON)


@fuzzed
@given(body=raw | values.map(lambda value: json.dumps(value).encode()), type=st.sampled_from(
    ["application/json", "text/plain", "", "multipart/form-data", "application/json; charset=x"]
))  # fmt: skip
def test_a_body_of_anything(ask: Asker, body: bytes, type: str) -> None:
    for path in (JOBS, "JOB/resume", "/v1/files"):
        ask("POST", path, content=body, headers={"content-type": type})


@fuzzed
@given(key=texts | st.text(max_size=8), retries=texts, body=st.just({"model": "tiny"}) | bodies)
def test_headers_of_anything(ask: Asker, key: str, retries: str, body: dict[str, Any]) -> None:
    headers = {
        "idempotency-key": key.encode("utf-8", "replace").replace(b"\x00", b"?"),
        "x-stainless-retry-count": retries.encode("utf-8", "replace").replace(b"\x00", b"?"),
        "content-type": b"application/json",
    }
    clean = {name: bytes(c for c in value if c >= 32).strip() for name, value in headers.items()}
    ask("POST", JOBS, content=ask.json(body), headers=clean)


@fuzzed
@given(
    path=st.sampled_from(LISTS),
    query=st.lists(st.tuples(st.sampled_from(QUERY) | texts, texts | numbers.map(str)), max_size=3),
)
def test_a_query_of_anything(ask: Asker, path: str, query: list[tuple[str, str]]) -> None:
    pairs = [
        f"{quote(name.encode('utf-8', 'surrogatepass'))}="
        f"{quote(value.encode('utf-8', 'surrogatepass'))}"
        for name, value in query
    ]
    ask("GET", f"{path}?{'&'.join(pairs)}")


@fuzzed
@given(name=texts, move=st.sampled_from(MOVES))
def test_an_id_of_anything(ask: Asker, name: str, move: str) -> None:
    given = quote(name.encode("utf-8", "surrogatepass"), safe="")
    for path in (
        f"{JOBS}/{given}", f"{JOBS}/{given}/events", f"JOB/artifacts/{given}",
        f"/v1/files/{given}", f"/v1/files/{given}/content", f"/v1/models/{given}",
    ):  # fmt: skip
        ask("GET", path)
    ask("POST", f"{JOBS}/{given}/{move}")
    ask("DELETE", f"/v1/files/{given}")


@fuzzed
@given(
    filename=texts, purpose=texts | st.just("fine-tune"), content=st.binary(max_size=30),
    fields=st.dictionaries(st.sampled_from(["purpose", "expires_after[anchor]"]) | texts, texts,
                           max_size=2),
)  # fmt: skip
def test_an_upload_of_anything(
    ask: Asker, filename: str, purpose: str, content: bytes, fields: dict[str, str]
) -> None:
    parts = [
        ("purpose", None, purpose.encode("utf-8", "surrogatepass")),
        ("file", filename, content),
    ]
    parts += [
        (name, None, value.encode("utf-8", "surrogatepass")) for name, value in fields.items()
    ]
    lines = []
    for name, file, value in parts:
        label = f'; filename="{file}"' if file is not None else ""
        head = f'Content-Disposition: form-data; name="{name}"{label}\r\n\r\n'
        lines += [b"--limit\r\n", head.encode("utf-8", "surrogatepass"), value, b"\r\n"]
    body = b"".join([*lines, b"--limit--\r\n"])
    ask("POST", "/v1/files", content=body,
        headers={"content-type": "multipart/form-data; boundary=limit"})  # fmt: skip


@fuzzed
@given(body=raw, boundary=texts)
def test_a_broken_form(ask: Asker, body: bytes, boundary: str) -> None:
    text = boundary.encode("ascii", "ignore").decode()
    printable = "".join(char for char in text if char.isprintable()).strip()
    kind = f"multipart/form-data; boundary={printable}".strip()
    ask("POST", "/v1/files", content=b"--limit\r\n" + body, headers={"content-type": kind})
