"""What surrounds every request: its id, the last catch for errors, the limit of its body."""

from __future__ import annotations

import uuid

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamahome.errors import InvalidData
from llamahome.gateway import names
from llamahome.gateway.problems import envelope, error_response

_LOG = structlog.get_logger(__name__)


class RequestEnvelope:
    """Gives each answer an ``x-request-id``, and unexpected errors OpenAI's envelope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                header = (names.REQUEST_ID_HEADER.encode(), request_id.encode())
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            _LOG.info("client went away", request=request_id, path=scope["path"])
        except Exception:
            # The last catch: one bad request must not end the connection without an answer.
            _LOG.exception(
                "request failed", request=request_id, method=scope["method"], path=scope["path"]
            )
            if started:
                raise  # the status is sent; only a broken connection can still say "failed"
            message = (
                f"The server had an error while processing your request (request id {request_id})"
            )
            await envelope(500, message, code="internal_error")(scope, receive, send_with_id)


class BodyLimit:
    """Reads bodies (all but uploads, which are streamed) up to a limit before they are parsed."""

    def __init__(self, app: ASGIApp, limit_bytes: int = names.MAX_BODY_BYTES) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = scope.get("method") == "POST" and scope.get("path") == names.FILES_PATH
        if scope["type"] != "http" or upload or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        size = 0
        more = True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._limit_bytes:
                error = InvalidData(
                    f"the body has more than {self._limit_bytes} bytes", code="body_too_large"
                )
                await error_response(error)(scope, receive, send)
                return
            more = message.get("more_body", False)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)
