"""The Celery application: an interface and a work distributor, never the truth.

Why each setting: docs/decisions/0002-redis-is-the-doorway.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis
from celery import Celery
from kombu.entity import Queue
from redis.backoff import NoBackoff
from redis.retry import Retry

from llamahome.config import Settings
from llamahome.queueing.names import ALL_QUEUES

TRANSPORT_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 5,
    # Only the submission queue acknowledges late; its task takes well under a second.
    "visibility_timeout": 600,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "queue_order_strategy": "priority",
}


def make_app(settings: Settings, *, queues: Sequence[str] = ALL_QUEUES) -> Celery:
    """An application of its own for each caller; nothing global, nothing connected yet."""
    app = Celery("llamahome", broker=settings.redis, set_as_current=False)
    app.conf.update(
        broker_transport_options=TRANSPORT_OPTIONS,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_queues=[Queue(name) for name in queues],  # type: ignore[no-untyped-call]
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_create_missing_queues=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # Doorbells carry no schedule, but celery warns where the time zone is not set.
        enable_utc=True,
    )
    return app


def redis_client(settings: Settings, *, timeout_seconds: float = 1.0) -> redis.Redis:
    """A plain client on the broker's database, for queue lengths and health; short timeouts."""
    url = settings.redis
    # redis-py's own default waits through several backoffs: seconds, on somebody's request path.
    no_retry = Retry(NoBackoff(), 0)
    if url.startswith("redis+socket://"):
        parts = urlsplit(url)
        database = parse_qs(parts.query).get("virtual_host", ["0"])[0]
        return redis.Redis(
            unix_socket_path=parts.path,
            db=int(database),
            socket_timeout=timeout_seconds,
            retry=no_retry,
        )
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=no_retry,
    )
