"""Doorbells: content-free hints that a queue may have work.

Ringing is best effort: it never raises and never waits more than about a second, because the
sweeper rings again for whatever is still ready. The number of messages in a queue is bounded, so
Redis stays small at any backlog.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

import redis
import structlog
from kombu.exceptions import OperationalError

from llamahome.config import Settings
from llamahome.queueing.app import TRANSPORT_OPTIONS, make_app, redis_client
from llamahome.queueing.names import queue_name, ring_task
from llamahome.schemas import Doorbell, Stage

RING_BOUND = 64  # messages in one queue; idle workers beyond that hear the sweeper's next round
_LOG = structlog.get_logger(__name__)


class Bell(Protocol):
    """Whatever can wake a stage's workers."""

    def ring(self, stage: Stage, *, count: int = 1, recover: bool = False) -> None:
        """Wake up to ``count`` workers. Never raises, and promises nothing."""
        ...


class CeleryBell:
    """Rings through Redis, as Celery messages."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)
        self._app.conf.broker_transport_options = TRANSPORT_OPTIONS | {
            # kombu retries a first connection for ever unless told otherwise.
            "max_retries": 0,
            "socket_timeout": 1,
            "socket_connect_timeout": 1,
        }
        self._redis = redis_client(settings)

    def ring(self, stage: Stage, *, count: int = 1, recover: bool = False) -> None:
        queue = queue_name(stage, recover=recover)
        message = Doorbell(queue=queue).model_dump()
        try:
            room = RING_BOUND - int(self._redis.llen(queue))
            for _ in range(min(count, room)):
                self._app.send_task(
                    ring_task(stage), kwargs=message, queue=queue, retry=False, ignore_result=True
                )
        except (redis.RedisError, OperationalError, OSError) as error:
            _LOG.warning("doorbell not rung", queue=queue, error=str(error))


class FaultyBell:
    """A bell that loses and doubles what it is given: the default double in tests.

    With doorbells every behaviour must survive it, because Redis may do the same.
    """

    def __init__(
        self,
        ring: Callable[[Stage, bool], None],
        *,
        drop_share: float = 0.3,
        double_share: float = 0.3,
        seed: int = 0,
    ) -> None:
        self._ring = ring
        self._drop_share = drop_share
        self._double_share = double_share
        self._random = random.Random(seed)
        self.dropped = 0

    def ring(self, stage: Stage, *, count: int = 1, recover: bool = False) -> None:
        for _ in range(count):
            if self._random.random() < self._drop_share:
                self.dropped += 1
                continue
            self._ring(stage, recover)
            if self._random.random() < self._double_share:
                self._ring(stage, recover)
