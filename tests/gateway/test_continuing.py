"""Fine-tuning what was fine-tuned: the model's name is that of an earlier job's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from llamahome.client import Client
from llamahome.gateway import GatewayDeps
from llamahome.ledger import Claim
from llamahome.schemas import JobState

Drive = Callable[[str, JobState], Claim | None]
Submit = Callable[..., str]


@pytest.fixture
def earlier(stock: openai.OpenAI, submit: Submit, drive: Drive) -> str:
    """The name of a fine-tuned model."""
    job_id = submit(suffix="bot")
    drive(job_id, JobState.succeeded)
    name = stock.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    assert name is not None
    return name


def test_a_fine_tuned_model_is_gone_on_from_with_its_own_lora(
    strict: openai.OpenAI, submit: Submit, drive: Drive, deps: GatewayDeps, earlier: str
) -> None:
    """The recipe has a LoRA of its own, which does not count here; its other settings do."""
    before = deps.ledger.job(f"ftjob-{earlier.rpartition(':')[2]}")

    job_id = submit(model=earlier, extra_body={"recipe": "quick"})

    spec = deps.ledger.job(job_id).spec
    assert spec.adapter == before.adapter
    assert (spec.adapter_name, spec.base) == (earlier, before.spec.base)
    lora = spec.config["lora"]
    assert {key: lora[key] for key in ("r", "alpha", "use_rslora", "target_modules")} == {
        "r": 6, "alpha": 12.0, "use_rslora": True, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    assert strict.fine_tuning.jobs.retrieve(job_id).model == earlier
    drive(job_id, JobState.succeeded)
    again = strict.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    assert again == f"ft:tiny:acme::{job_id.removeprefix('ftjob-')}"


def test_our_client_names_it_as_it_names_a_base(
    ours: Client, deps: GatewayDeps, earlier: str, rows: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows)
    job = ours.submit(path, base=earlier, config={"epochs": 1})
    assert job.model == earlier
    assert deps.ledger.job(job.id).spec.adapter is not None


@pytest.mark.parametrize(
    ("lora", "field", "text"),
    [
        ({"r": 8}, "r", "is 8, but .* was trained with 6"),
        ({"alpha": 32}, "alpha", "is 32.0, but .* was trained with 12.0"),
        ({"use_rslora": False}, "use_rslora", "is False, but .* was trained with True"),
        ({"target_modules": ["q_proj"]}, "target_modules", "trained with .'q_proj', 'v_proj'."),
    ],
)
def test_another_lora_than_its_own_is_refused_naming_both(
    submit: Submit, earlier: str, lora: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        submit(model=earlier, extra_body={"config": {"lora": lora}})
    assert caught.value.code == "adapter_mismatch"
    assert caught.value.param == f"config.lora.{field}"


def test_its_own_lora_may_be_said_again(submit: Submit, earlier: str) -> None:
    submit(model=earlier, extra_body={"config": {"lora": {"r": 6, "dropout": 0.0}}})


def test_another_tenants_model_does_not_exist(
    stranger: openai.OpenAI, put_file: Callable[[str], str], earlier: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="does not exist") as caught:
        stranger.fine_tuning.jobs.create(model=earlier, training_file=put_file("rival"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_base_that_changed_since_is_refused_naming_both_digests(
    submit: Submit, deps: GatewayDeps, earlier: str
) -> None:
    deps.ledger.add_base("tiny", "/bases/tiny", "1" * 64)
    with pytest.raises(openai.BadRequestError, match="000000000000.* 111111111111") as caught:
        submit(model=earlier)
    assert caught.value.code == "base_changed"


def test_a_model_whose_files_are_gone_is_told_of(
    submit: Submit, deps: GatewayDeps, earlier: str
) -> None:
    adapter = deps.ledger.job(f"ftjob-{earlier.rpartition(':')[2]}").adapter
    assert adapter is not None
    deps.storage.delete(adapter.path)
    with pytest.raises(openai.BadRequestError, match="no longer there"):
        submit(model=earlier)


def test_a_repeated_submission_answers_the_first_job(
    stock: openai.OpenAI, upload: Callable[[], str], earlier: str
) -> None:
    body = {"model": earlier, "training_file": upload(), "extra_body": {"submission_id": "one"}}
    first = stock.fine_tuning.jobs.create(**body)
    assert stock.fine_tuning.jobs.create(**body).id == first.id
    with pytest.raises(openai.ConflictError, match="another model"):
        stock.fine_tuning.jobs.create(**{**body, "model": "tiny"})
