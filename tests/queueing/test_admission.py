"""The door: what is accepted, what is refused, and that refusing loses nothing."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Settings, load_settings
from llamahome.errors import (
    InvalidConfig,
    InvalidData,
    NotFound,
    QuotaExceeded,
    Unavailable,
    UserError,
)
from llamahome.ledger import Ledger
from llamahome.queueing.admission import Admission, Wanted
from llamahome.queueing.doorbell import Bell, FaultyBell
from llamahome.queueing.submissions import SubmissionDesk
from llamahome.schemas import JobState, Stage, StoredFile
from llamahome.storage import Storage


@pytest.fixture
def rings() -> list[Stage]:
    return []


@pytest.fixture
def make_admission(
    ledger: Ledger, storage: Storage, settings: Settings, rings: list[Stage]
) -> Callable[..., Admission]:
    ledger.add_base("tiny", "/bases/tiny", "b" * 64)
    bell: Bell = FaultyBell(lambda stage, _: rings.append(stage), drop_share=0, double_share=0)

    def make(**changes: Any) -> Admission:
        changed = load_settings(**(settings.model_dump(exclude_unset=True) | changes))
        return Admission(ledger, storage, changed, bell)

    return make


@pytest.fixture
def admission(make_admission: Callable[..., Admission]) -> Admission:
    return make_admission()


@pytest.fixture
def upload(admission: Admission) -> StoredFile:
    return admission.store_upload(
        "acme",
        filename="a.jsonl",
        purpose="fine-tune",
        stream=io.BytesIO(b'{"messages": []}\n' * 9),
    )


def test_an_upload_is_kept_under_its_digest(upload: StoredFile, storage: Storage) -> None:
    assert upload.path == f"uploads/acme/{upload.sha256}"
    with storage.open(upload.path) as stream:
        assert len(stream.read()) == upload.bytes == 9 * 17


def test_an_upload_over_the_limit_is_refused_and_nothing_stays(
    make_admission: Callable[..., Admission], ledger: Ledger, tmp_path: Path
) -> None:
    small = make_admission(max_file_bytes=10)
    with pytest.raises(InvalidData, match=r"big\.jsonl: larger than 10 bytes"):
        small.store_upload(
            "acme", filename="big.jsonl", purpose="fine-tune", stream=io.BytesIO(b"x" * 11)
        )
    assert ledger.files("acme")[0] == []
    assert [p for p in (tmp_path / "storage").rglob("*") if p.is_file()] == []


def test_a_job_is_accepted_with_its_effective_configuration_and_rung_for(
    admission: Admission, upload: StoredFile, rings: list[Stage]
) -> None:
    """BEHAVIOUR 25: the effective settings are kept with the job."""
    wanted = Wanted(
        model="tiny",
        training_file=upload.id,
        recipe="quick",
        config={"lora": {"r": 4}, "epochs": 1},
    )
    job, created = admission.submit("acme", wanted, kind="http")
    assert created
    assert job.spec.config["lora"]["r"] == 4
    assert job.spec.config["lora"]["target_modules"] == "all-linear"
    assert job.spec.config["seed"] == 42
    assert rings == [Stage.validation] * 16  # 153 bytes in ranges of 10


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"model": "tinny"}, NotFound, "Did you mean 'tiny'"),
        ({"training_file": "file-none"}, NotFound, "file-none"),
        ({"config": {"lerning_rate": 1}}, InvalidConfig, "Did you mean 'learning_rate'"),
        ({"config": {"epochs": 0}}, InvalidConfig, "epochs"),
        ({"recipe": "quik"}, NotFound, "Did you mean 'quick'"),
        ({"training_file": "file:///etc/passwd"}, UserError, "not below an allowed folder"),
    ],
)
def test_a_wrong_wish_is_refused_by_name_and_leaves_no_job(
    admission: Admission,
    upload: StoredFile,
    ledger: Ledger,
    change: dict[str, Any],
    kind: type[Exception],
    text: str,
) -> None:
    """BEHAVIOUR 25: a submission's settings are checked by the schema of the file."""
    good = {"model": "tiny", "training_file": upload.id}
    with pytest.raises(kind, match=text):
        admission.submit("acme", Wanted(**(good | change)), kind="http")
    assert ledger.jobs("acme") == ([], False)


def test_another_tenants_file_is_not_found(admission: Admission, upload: StoredFile) -> None:
    with pytest.raises(NotFound):
        admission.submit("other", Wanted(model="tiny", training_file=upload.id), kind="http")


def test_the_quota_counts_jobs_in_flight(
    make_admission: Callable[..., Admission], upload: StoredFile
) -> None:
    strict = make_admission(quota_active_jobs=1)
    wanted = Wanted(model="tiny", training_file=upload.id)
    first, _ = strict.submit("acme", wanted, kind="http", submission_id="one")
    with pytest.raises(QuotaExceeded, match="1 jobs are in flight"):
        strict.submit("acme", wanted, kind="http")
    again, created = strict.submit("acme", wanted, kind="http", submission_id="one")
    assert (again.id, created) == (first.id, False), (
        "asking again for an accepted job is no new one"
    )


def test_of_submissions_at_once_no_more_than_the_quota_are_accepted(
    make_admission: Callable[..., Admission], upload: StoredFile, ledger: Ledger
) -> None:
    strict = make_admission(quota_active_jobs=2)
    ended = strict.submit("acme", Wanted(model="tiny", training_file=upload.id), kind="http")[0]
    ledger.cancel(ended.id)
    together = threading.Barrier(8)
    refused: list[QuotaExceeded] = []

    def send(number: int) -> None:
        together.wait()
        try:
            if number % 2:
                strict.retry(ended.id, "acme")
            else:
                strict.submit("acme", Wanted(model="tiny", training_file=upload.id), kind="http")
        except QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ledger.active_jobs("acme"), len(refused)) == (2, 6)


def test_a_retry_is_a_new_job_like_the_old_one(
    admission: Admission, upload: StoredFile, ledger: Ledger
) -> None:
    job, _ = admission.submit("acme", Wanted(model="tiny", training_file=upload.id), kind="http")
    with pytest.raises(UserError, match="is accepted"):
        admission.retry(job.id, "acme")
    ledger.cancel(job.id)
    new = admission.retry(job.id, "acme")
    assert new.retry_of == job.id
    assert new.spec == job.spec


def test_an_allow_listed_uri_is_copied_in_but_never_through_a_parent_folder(
    make_admission: Callable[..., Admission], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text("{}\n")
    (tmp_path / "secret").write_text("s")
    open_door = make_admission(uri_allowlist=(f"file://{data}/",))
    wanted = Wanted(model="tiny", training_file=f"file://{data}/a.jsonl")
    job, _ = open_door.submit("acme", wanted, kind="celery")
    assert job.spec.training_files[0].filename == "a.jsonl"
    for uri in (f"file://{data}/../secret", f"file://{tmp_path}/secret"):
        with pytest.raises(UserError, match="not below an allowed folder"):
            open_door.submit("acme", Wanted(model="tiny", training_file=uri), kind="celery")
    (tmp_path / "data-secret").mkdir()
    (tmp_path / "data-secret" / "a.jsonl").write_text("s")
    bare = make_admission(uri_allowlist=(f"file://{data}",))
    beside = Wanted(model="tiny", training_file=f"file://{tmp_path}/data-secret/a.jsonl")
    with pytest.raises(UserError, match="not below an allowed folder"):
        bare.submit("acme", beside, kind="celery")


def test_a_uri_that_cannot_be_read_is_refused_by_its_name(
    make_admission: Callable[..., Admission], tmp_path: Path, ledger: Ledger
) -> None:
    (tmp_path / "data" / "folder").mkdir(parents=True)
    open_door = make_admission(uri_allowlist=(f"file://{tmp_path}/data",))
    for name, kind, text in (
        ("missing", NotFound, "no such file: file://.*/data/missing"),
        ("folder", InvalidData, "file://.*/data/folder cannot be read: Is a directory"),
    ):
        wanted = Wanted(model="tiny", training_file=f"file://{tmp_path}/data/{name}")
        with pytest.raises(kind, match=text):
            open_door.submit("acme", wanted, kind="celery")
    assert ledger.files("acme")[0] == []


def test_a_scratch_folder_that_cannot_be_written_is_unavailable(
    make_admission: Callable[..., Admission], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{}\n")
    (tmp_path / "scratch").write_text("in the way")
    open_door = make_admission(uri_allowlist=(f"file://{tmp_path}/data",))
    wanted = Wanted(model="tiny", training_file=f"file://{tmp_path}/data/a.jsonl")
    with pytest.raises(Unavailable, match=r"a\.jsonl cannot be kept for now"):
        open_door.submit("acme", wanted, kind="celery")


def _message(key: str, upload: StoredFile, **changes: Any) -> dict[str, Any]:
    message = {
        "v": 1, "submission_id": "sub-1", "api_key": key, "model": "tiny",
        "training_file": upload.id,
    }  # fmt: skip
    return message | changes


def test_a_submission_message_makes_one_job_however_often_it_comes(
    admission: Admission, ledger: Ledger, upload: StoredFile
) -> None:
    desk = SubmissionDesk(ledger, admission)
    key = ledger.create_key("acme").key
    made = {desk.take(_message(key, upload)) for _ in range(3)}
    assert len(made) == 1
    (job_id,) = made
    assert job_id is not None
    assert ledger.job(job_id).kind == "celery"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "none"}, "model_not_found"),
        ({"config": {"epochs": 0}}, "invalid_value"),
        ({"training_file": "file-x"}, "file_not_found"),
        ({"surprise": 1}, "invalid_submission"),
        ({"v": 2}, "invalid_submission"),
        ({"metadata": {"a": 1}}, "invalid_submission"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "invalid_submission"),
        ({"suffix": "x" * 65}, "invalid_submission"),
    ],
)
def test_a_submission_that_cannot_run_is_a_failed_job_its_sender_can_find(
    admission: Admission, ledger: Ledger, upload: StoredFile, change: dict[str, Any], code: str
) -> None:
    desk = SubmissionDesk(ledger, admission)
    job_id = desk.take(_message(ledger.create_key("acme").key, upload, **change))
    found = ledger.job_by_submission("acme", "sub-1")
    assert found is not None
    assert found.id == job_id
    assert found.state is JobState.failed
    assert found.error is not None
    assert found.error.code == code


def test_what_nobody_foresaw_is_a_failed_job_too(
    admission: Admission, ledger: Ledger, upload: StoredFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(admission, "submit", fail)
    job_id = SubmissionDesk(ledger, admission).take(_message(ledger.create_key("acme").key, upload))
    assert job_id is not None
    found = ledger.job(job_id)
    assert found.state is JobState.failed
    assert found.error is not None
    assert found.error.code == "internal_error"


def test_a_submission_with_an_unknown_key_makes_nothing(
    admission: Admission, ledger: Ledger, upload: StoredFile
) -> None:
    desk = SubmissionDesk(ledger, admission)
    assert desk.take(_message("llh-guess", upload)) is None
    assert desk.take(_message("llh-guess", upload, v=9)) is None
    assert ledger.jobs(None) == ([], False)
