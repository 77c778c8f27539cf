"""HTTP below the client: retries that cannot do harm, and answers turned into the error tree."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx2

from llamahome.errors import (
    InvalidConfig,
    InvalidData,
    InvalidState,
    LlamaHomeError,
    NotFound,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
    UserError,
)
from llamahome.schemas import JsonObject

T = TypeVar("T")

# The stock OpenAI clients say with this header which try it is; the gateway uses it to answer a
# repeated upload with the first one's file.
RETRY_COUNT_HEADER = "x-stainless-retry-count"
_MAX_BACKOFF_SECONDS = 4.0
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_DATA_CODES = ("invalid_training_file", "invalid_n_examples", "file_too_large")


class Http:
    """One connection pool to one gateway, speaking its error envelope."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout: float,
        retries: int,
        backoff_seconds: float,
        transport: httpx2.BaseTransport | None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._retries = retries
        self._backoff_seconds = backoff_seconds
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            timeout=timeout,
            transport=transport,
        )

    def close(self) -> None:
        self._client.close()

    def json(self, method: str, path: str, *, repeatable: bool = True, **request: Any) -> Any:
        """The decoded answer. Raises the error tree; see :meth:`retrying` for ``repeatable``."""
        return self.retrying(
            lambda number: self.once(method, path, number, **request), repeatable=repeatable
        )

    def once(self, method: str, path: str, number: int, **request: Any) -> Any:
        """One try, the ``number``-th from 0. Raises httpx2.TransportError beside the tree."""
        headers = {RETRY_COUNT_HEADER: str(number)}
        response = self._client.request(method, path, headers=headers, **request)
        self._check(response)
        try:
            return response.json()
        except ValueError:
            raise self._not_ours(response) from None

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[httpx2.Response]:
        """An open download, its status checked. Raises httpx2.TransportError beside the tree."""
        with self._client.stream("GET", path) as response:
            if response.status_code >= 300:
                response.read()
            self._check(response)
            yield response

    def lines(self, path: str) -> Iterator[JsonObject]:
        """The objects of a JSON-lines answer, read as they come. Raises the error tree."""
        try:
            with self.stream(path) as response:
                for line in response.iter_lines():
                    yield json.loads(line)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def retrying(self, attempt: Callable[[int], T], *, repeatable: bool = True) -> T:
        """Call ``attempt(n)``, n = 0, 1, ..., until it answers or the retries are spent.

        What is tried again: requests that were never sent, and, where sending twice does no harm
        (``repeatable``), broken connections, timeouts and 5xx answers. Raises Unavailable.
        """
        number = 0
        while True:
            try:
                return attempt(number)
            except httpx2.TransportError as error:
                again = repeatable or isinstance(error, _NEVER_SENT)
                failure = self._unreachable(error)
            except Unavailable as error:
                again = repeatable
                failure = error
            if not again or number >= self._retries:
                raise failure
            self._back_off(number)
            number += 1

    def _back_off(self, number: int) -> None:
        # Jitter, so that the clients of a restarted gateway do not all come back at once.
        seconds = min(_MAX_BACKOFF_SECONDS, self._backoff_seconds * 2**number)
        time.sleep(seconds * random.uniform(0.75, 1.0))

    def _unreachable(self, error: httpx2.TransportError) -> Unavailable:
        problem = str(error) or type(error).__name__
        return Unavailable(
            f"{self.url} does not answer ({problem})",
            remedy="Is the gateway running, and is the URL (LLAMAHOME_URL) right?",
        )

    def _not_ours(self, response: httpx2.Response) -> Unavailable:
        return Unavailable(
            f"{response.url} answered {response.status_code} without JSON: {response.text[:80]!r}",
            remedy="Does the URL (LLAMAHOME_URL) name the gateway itself?",
        )

    def _check(self, response: httpx2.Response) -> None:
        if response.status_code < 300:
            return
        body = _envelope(response)
        if body is None:
            raise self._not_ours(response)
        raise error_of(response, body, url=self.url)


def _envelope(response: httpx2.Response) -> dict[str, Any] | None:
    try:
        body = json.loads(response.content)
    except ValueError:
        return None
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else None


def error_of(response: httpx2.Response, body: dict[str, Any], *, url: str) -> LlamaHomeError:
    """The exception that stands for an error answer; ``body`` is what stands under "error"."""
    code, field = body.get("code"), body.get("param")
    message = str(body.get("message") or "no message")
    status = response.status_code
    if status >= 500:
        request = response.headers.get("x-request-id", "unknown")
        named = "" if request in message else f" (request id {request})"
        return Unavailable(
            f"{url} answered {status}: {message}{named}", code=code,
            remedy="Try again later; if it stays, tell the operator",
        )  # fmt: skip
    kind = _kind(status, code)
    return kind(message, code=code, field=field)


def _kind(status: int, code: str | None) -> type[LlamaHomeError]:
    by_status: dict[int, type[LlamaHomeError]] = {
        401: Unauthenticated,
        403: UserError,
        404: NotFound,
        429: QuotaExceeded,
    }
    if status in by_status:
        return by_status[status]
    if code is not None and code.endswith("_not_found"):
        return NotFound
    if code == "invalid_job_state":
        return InvalidState
    return InvalidData if code in _DATA_CODES else InvalidConfig
