"""Asking a URL whether it is well; the standard library only."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

from llamahome.errors import InvalidConfig, Unavailable

TIMEOUT_SECONDS = 5.0


def check_url(url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """GET ``url``. Raises Unavailable unless it answers 200 in time, InvalidConfig for no http URL.

    Proxies of the environment are not used: a health check is about this host or network.
    """
    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(
            f"{url!r} is not an http URL",
            field="URL",
            remedy="For example http://127.0.0.1:8080/healthz",
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_seconds) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"{url} does not answer: {reason}") from None
    if status != 200:
        raise Unavailable(f"{url} answers {status}, not 200")


def is_well(url: str) -> bool:
    """Whether :func:`check_url` finds nothing, asked with a short timeout."""
    try:
        check_url(url, timeout_seconds=2.0)
    except Unavailable:
        return False
    return True
