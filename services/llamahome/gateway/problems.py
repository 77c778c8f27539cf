"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``, always."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from llamahome.errors import (
    InvalidConfig,
    LlamaHomeError,
    NotFound,
    QuotaExceeded,
    TransientError,
    Unauthenticated,
    UserError,
    nearest,
)
from llamahome.gateway import names

_BY_CODE = {
    "file_too_large": 413,
    "body_too_large": 413,
    "idempotency_key_reuse": 409,
}
# What OpenAI calls the id in the path.
_PARAM_BY_CODE = {"fine_tune_not_found": "fine_tune_id"}
_BY_KIND: tuple[tuple[type[LlamaHomeError], int], ...] = (
    (Unauthenticated, 401),
    (NotFound, 404),
    (UserError, 400),
    (QuotaExceeded, 429),
    (TransientError, 503),
)


def status_of(error: LlamaHomeError) -> int:
    """400 rather than 422, and never 501: the stock clients retry every 5xx."""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next((status for kind, status in _BY_KIND if isinstance(error, kind)), 500)


def error_response(error: LlamaHomeError) -> JSONResponse:
    status = status_of(error)
    param = error.place.field or _PARAM_BY_CODE.get(error.code)
    return envelope(status, _message(error), code=error.code, param=param, headers=_headers(status))


def envelope(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    if status >= 500:
        kind = "server_error"
    else:
        kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    body = {
        "error": {
            "message": _encodable(message),
            "type": kind,
            "param": None if param is None else _encodable(param),
            "code": code,
        }
    }
    return JSONResponse(body, status_code=status, headers=headers)


def _message(error: LlamaHomeError) -> str:
    # The field travels as ``param``; a file and line have no other place than the text.
    where = str(type(error.place)(file=error.place.file, line=error.place.line))
    text = f"{where}: {error.message}" if where else error.message
    return f"{text.rstrip('.')}. {error.remedy}" if error.remedy else text


def _encodable(text: str) -> str:
    # JSON may hold half of a surrogate pair, which is quoted back here but cannot be sent.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _headers(status: int) -> dict[str, str]:
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status == 409:  # the clients would retry it by themselves
        return {names.SHOULD_RETRY_HEADER: "false"}
    if status == 429:
        after = str(names.QUOTA_RETRY_AFTER_SECONDS)
        return {names.SHOULD_RETRY_HEADER: "false", "retry-after": after}
    if status == 503:
        return {"retry-after": str(names.UNAVAILABLE_RETRY_AFTER_SECONDS)}
    return {}


def validation_problem(
    error: RequestValidationError, known: dict[tuple[str, ...], list[str]]
) -> InvalidConfig:
    """The first thing wrong with a request; an unknown name goes before what it left missing.

    ``known`` has the names that may stand in each section of the body.
    """
    problems = error.errors()
    strangers = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    return _problem((strangers or problems)[0], known)


def _problem(problem: dict[str, Any], known: dict[tuple[str, ...], list[str]]) -> InvalidConfig:
    kind = str(problem["type"])
    path = tuple(str(part) for part in problem["loc"][1:])
    field = ".".join(path) or None
    if kind == "json_invalid":
        return InvalidConfig("the body is not JSON", code="invalid_json")
    if kind == "extra_forbidden":
        remedy = nearest(path[-1], known.get(path[:-1], ()))
        return InvalidConfig(
            f"Unrecognized request argument supplied: {path[-1]}",
            code="unknown_parameter", field=field, remedy=remedy,
        )  # fmt: skip
    if kind == "missing":
        return InvalidConfig(
            f"Missing required parameter: {field or 'a JSON body'}",
            code="missing_required_parameter", field=field,
        )  # fmt: skip
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, dict | list) or "not " in message else f", not {value!r}"
    code = kind if kind in _OWN_CODES else "invalid_value"
    return InvalidConfig(
        f"{field or 'the body'}: {message[0].lower()}{message[1:]}{shown}", code=code, field=field
    )


# Error types that validators of ours raise as PydanticCustomError.
_OWN_CODES = ("unsupported_method", "unsupported_parameter")
