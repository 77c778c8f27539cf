"""Files, through the stock client and by hand."""

from __future__ import annotations

import hashlib
import io
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from llamahome.gateway import GatewayDeps


def test_a_file_is_stored_listed_read_back_and_deleted(strict: openai.OpenAI, rows: bytes) -> None:
    made = strict.files.create(file=("rows.jsonl", rows), purpose="fine-tune")

    assert (made.filename, made.bytes, made.purpose) == ("rows.jsonl", len(rows), "fine-tune")
    assert made.status == "processed"
    assert strict.files.retrieve(made.id) == made
    assert [file.id for file in strict.files.list()] == [made.id]
    assert strict.files.content(made.id).read() == rows
    assert strict.files.wait_for_processing(made.id).id == made.id

    assert strict.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        strict.files.retrieve(made.id)
    assert refused.value.code == "file_not_found"
    assert refused.value.param == "id"
    assert list(strict.files.list()) == []


def test_content_carries_its_digest_and_length(stock: openai.OpenAI, rows: bytes) -> None:
    made = stock.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    answer = stock.files.with_raw_response.content(made.id)
    assert answer.headers["x-content-sha256"] == hashlib.sha256(rows).hexdigest()
    assert int(answer.headers["content-length"]) == len(rows)


def test_files_are_paged_newest_first_without_repeats_or_gaps(stock: openai.OpenAI) -> None:
    made = [
        stock.files.create(file=(f"{n}.jsonl", b"{}\n"), purpose="fine-tune").id for n in range(7)
    ]
    assert [file.id for file in stock.files.list(limit=3)] == made[::-1]
    assert [file.id for file in stock.files.list(limit=3, order="asc")] == made
    page = stock.files.list(limit=3)
    assert (page.first_id, page.last_id) == (made[6], made[4])  # type: ignore[attr-defined]
    assert page.has_more


def test_files_are_filtered_by_purpose(stock: openai.OpenAI) -> None:
    stock.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
    kept = stock.files.create(file=("b.jsonl", b"{}\n"), purpose="fine-tune")
    assert [file.id for file in stock.files.list(purpose="fine-tune")] == [kept.id]


def test_an_empty_upload_is_refused(stock: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        stock.files.create(file=("rows.jsonl", b""), purpose="fine-tune")
    assert (refused.value.code, refused.value.param) == ("invalid_value", "file")
    assert "is empty" in refused.value.message
    assert list(stock.files.list()) == []


@pytest.mark.parametrize("limit", [0, -1, 10_001, 10**30])
def test_a_page_of_an_impossible_size_is_refused(
    stock: openai.OpenAI, submit: Callable[..., str], limit: int
) -> None:
    job_id = submit()
    lists: tuple[Callable[[], Any], ...] = (
        lambda: stock.files.list(limit=limit),
        lambda: stock.fine_tuning.jobs.list(limit=limit),
        lambda: stock.fine_tuning.jobs.list_events(job_id, limit=limit),
        lambda: stock.fine_tuning.jobs.checkpoints.list(job_id, limit=limit),
    )
    for each in lists:
        with pytest.raises(openai.BadRequestError) as refused:
            each()
        assert (refused.value.code, refused.value.param) == ("invalid_value", "limit")


def test_an_upload_that_the_client_repeats_is_one_file(stock: openai.OpenAI, rows: bytes) -> None:
    def send(retries: int, name: str = "rows.jsonl", data: bytes = rows) -> Any:
        return stock.files.with_raw_response.create(
            file=(name, data), purpose="fine-tune",
            extra_headers={"x-stainless-retry-count": str(retries)},
        )  # fmt: skip

    first = send(0)
    repeated = send(1)
    assert repeated.parse().id == first.parse().id
    assert repeated.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    # What differs in name or content is another file; so is what was sent twice on purpose.
    assert send(1, name="other.jsonl").parse().id != first.parse().id
    assert send(1, data=b"{}\n").parse().id != first.parse().id
    assert send(0).parse().id != first.parse().id


def test_the_stock_client_repeats_an_upload_whose_answer_was_lost(
    url: str, key: str, rows: bytes, deps: GatewayDeps
) -> None:
    """The first answer is thrown away on its way back, as a broken connection would."""

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
        made = client.files.create(file=("rows.jsonl", io.BytesIO(rows)), purpose="fine-tune")
    files, _ = deps.ledger.files("acme")
    assert [file.id for file in files] == [made.id]


def test_a_file_over_the_limit_is_refused_with_413(stock: openai.OpenAI, deps: GatewayDeps) -> None:
    limit = deps.settings.max_file_bytes
    stock.files.create(file=("fits.jsonl", b"x" * limit), purpose="fine-tune")
    for size in (limit + 1, 20 * limit):
        with pytest.raises(openai.APIStatusError) as refused:
            stock.files.create(file=("big.jsonl", b"x" * size), purpose="fine-tune")
        assert refused.value.status_code == 413
        assert refused.value.code == "file_too_large"


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ({"files": {"file": ("a", b"x")}}, "missing_required_parameter", "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": {"other": ("a", b"x")}}, "unknown_parameter",
         "other"),
        ({"data": {"purpose": "training"}, "files": {"file": ("a", b"x")}}, "invalid_value",
         "purpose"),
        ({"data": {"purpose": "fine-tune", "expires_after[anchor]": "created_at"},
          "files": {"file": ("a", b"x")}}, "unsupported_parameter", "expires_after"),
        ({"json": {"purpose": "fine-tune"}}, "invalid_value", None),
    ],
)  # fmt: skip
def test_a_form_that_is_not_understood_is_refused(
    url: str, key: str, http: httpx2.Client, form: dict[str, Any], code: str, param: str | None
) -> None:
    headers = {"authorization": f"Bearer {key}"}
    answer = http.post(f"{url}/v1/files", headers=headers, **form)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_a_name_with_folders_is_only_a_label(stock: openai.OpenAI) -> None:
    made = stock.files.create(file=("../../etc/passwd", b"{}\n"), purpose="fine-tune")
    assert made.filename == "passwd"


def test_an_upload_without_a_key_is_refused_before_its_body_is_parsed(
    url: str, http: httpx2.Client
) -> None:
    headers = {"content-type": "multipart/form-data"}  # no boundary: parsing it would be a 400
    answer = http.post(f"{url}/v1/files", content=b"x" * 5_000_000, headers=headers)
    assert answer.status_code == 401


@pytest.fixture
def half_an_upload(url: str, key: str) -> Iterator[socket.socket]:
    """A connection whose upload has begun and does not go on."""
    address = urllib.parse.urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 900000\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        connection.sendall(head.encode() + b"x" * 300_000)
        yield connection


def test_an_upload_that_stalls_does_not_hold_up_others(
    half_an_upload: socket.socket, stock: openai.OpenAI, rows: bytes
) -> None:
    for _ in range(3):
        assert stock.files.create(file=("rows.jsonl", rows), purpose="fine-tune").bytes


def test_a_client_that_goes_away_midway_leaves_nothing_and_is_no_error(
    half_an_upload: socket.socket, http: httpx2.Client, url: str, deps: GatewayDeps, logs: list[Any]
) -> None:
    half_an_upload.close()
    while not logs:  # each request gives the server a turn to notice
        http.get(f"{url}/healthz")
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("client went away", "info")
    ]
    assert deps.ledger.files("acme") == ([], False)


def test_another_tenants_file_is_not_found(
    stock: openai.OpenAI, stranger: openai.OpenAI, upload: Callable[[], str]
) -> None:
    mine = upload()
    for ask in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(mine)
        assert refused.value.code == "file_not_found"
    assert list(stranger.files.list()) == []
    with pytest.raises(openai.BadRequestError) as refused_cursor:
        stranger.files.list(after=mine)
    assert refused_cursor.value.code == "invalid_cursor"
    assert stock.files.retrieve(mine).id == mine
