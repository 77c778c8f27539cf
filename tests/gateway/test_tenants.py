"""A tenant sees its own objects only; everything else is not found, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import openai
import pytest

Submit = Callable[..., str]


def test_another_tenants_job_is_not_found_by_any_route(
    stock: openai.OpenAI,
    stranger: openai.OpenAI,
    submit: Submit,
    put_file: Callable[[str], str],
) -> None:
    mine = submit()
    jobs = stranger.fine_tuning.jobs
    for ask in (
        jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events,
        jobs.checkpoints.list,
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as refused:
            ask(mine)
        assert (refused.value.code, refused.value.param) == ("fine_tune_not_found", "fine_tune_id")
    for tail in ("runs", "artifacts", "artifacts/adapter_config.json", "report", "quarantine"):
        with pytest.raises(openai.NotFoundError):
            stranger.get(f"/fine_tuning/jobs/{mine}/{tail}", cast_to=httpx2.Response)
    with pytest.raises(openai.NotFoundError):
        stranger.post(f"/fine_tuning/jobs/{mine}/retry", cast_to=httpx2.Response)
    assert list(jobs.list()) == []
    with pytest.raises(openai.BadRequestError) as refused_cursor:
        jobs.list(after=mine)
    assert refused_cursor.value.code == "invalid_cursor"
    with pytest.raises(openai.BadRequestError) as refused_file:
        stranger.fine_tuning.jobs.create(model="tiny", training_file=stock.files.list().data[0].id)
    assert refused_file.value.code == "file_not_found"
    assert refused_file.value.param == "training_file"
    # The swap the other way.
    theirs = stranger.fine_tuning.jobs.create(model="tiny", training_file=put_file("rival"))
    with pytest.raises(openai.NotFoundError):
        stock.fine_tuning.jobs.retrieve(theirs.id)
    assert [job.id for job in stock.fine_tuning.jobs.list()] == [mine]
