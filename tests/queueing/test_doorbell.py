"""Doorbells through a real Redis, and without one."""

from __future__ import annotations

import json
import time

import pytest

from llamahome.config import Settings
from llamahome.queueing.doorbell import RING_BOUND, CeleryBell
from llamahome.queueing.names import ALL_QUEUES, SUBMIT_TASK, ring_task, stage_queues
from llamahome.schemas import Doorbell, Stage, SubmitMessage
from support.redis import private_redis


def test_queue_and_task_names_are_what_stock_senders_use() -> None:
    assert ALL_QUEUES == (
        "llamahome.validation.recover",
        "llamahome.validation",
        "llamahome.preprocessing.recover",
        "llamahome.preprocessing",
        "llamahome.training.recover",
        "llamahome.training",
        "llamahome.submissions",
    )
    assert SUBMIT_TASK == "llamahome.submit"
    assert [ring_task(stage) for stage in Stage] == [
        "llamahome.ring.validation",
        "llamahome.ring.preprocessing",
        "llamahome.ring.training",
    ]


def test_the_messages_have_exactly_these_fields() -> None:
    """BEHAVIOUR 80: messages are checked by pydantic."""
    assert set(Doorbell.model_fields) == {"v", "queue"}
    assert set(SubmitMessage.model_fields) == {
        "v", "submission_id", "api_key", "model", "training_file", "validation_file", "recipe",
        "suffix", "config", "metadata",
    }  # fmt: skip


def test_a_doorbell_is_small_json_without_content_and_the_queue_is_bounded(
    settings: Settings,
) -> None:
    """BEHAVIOUR 80: messages are small JSON."""
    with private_redis(settings) as client:
        bell = CeleryBell(settings)
        bell.ring(Stage.training, recover=True)
        raw = client.lindex("llamahome.training.recover", 0)
        assert isinstance(raw, bytes)
        assert len(raw) < 4096
        message = json.loads(raw)
        assert message["content-type"] == "application/json"
        assert message["headers"]["task"] == "llamahome.ring.training"
        bell.ring(Stage.validation, count=10 * RING_BOUND)
        bell.ring(Stage.validation, count=10 * RING_BOUND)
        assert client.llen(stage_queues(Stage.validation)[1]) == RING_BOUND


def test_ringing_without_redis_returns_at_once_and_comes_back_with_it(settings: Settings) -> None:
    bell = CeleryBell(settings)
    began = time.monotonic()
    bell.ring(Stage.validation)
    assert time.monotonic() - began < 1.5
    with private_redis(settings) as client:
        bell.ring(Stage.validation)
        assert client.llen("llamahome.validation") == 1


@pytest.mark.parametrize("stage", list(Stage))
def test_the_recover_queue_is_served_first(stage: Stage) -> None:
    assert stage_queues(stage) == (f"llamahome.{stage}.recover", f"llamahome.{stage}")
