from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from llamahome.cli import doctor
from llamahome.cli.bases import base_digest
from llamahome.config import load_settings
from llamahome.ledger import Ledger

from .conftest import RunCommand


@pytest.fixture
def state(tmp_path: Path, base_folder: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    with contextlib.closing(Ledger(f"sqlite:///{folder}/ledger.sqlite3")) as ledger:
        ledger.upgrade()
        ledger.add_base("tiny", str(base_folder), base_digest(base_folder))
    return folder


REAL_DEVICES = doctor.devices


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device check imports torch in another process, which takes seconds; one test does."""
    answer = doctor.Check("devices", "ok", "CPU")
    monkeypatch.setattr(doctor, "devices", lambda: answer)


def _states(ran_json: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in ran_json["checks"]}


def test_a_stopped_fleet_of_a_sound_machine_is_warned_about_and_exit_0(
    llamahome: RunCommand, state: Path
) -> None:
    ran = llamahome("doctor", "--state", state, "--json")
    assert ran.code == 0
    assert ran.json["ok"] is True
    states = _states(ran.json)
    assert states["ledger"] == states["storage"] == states["clock"] == states["base tiny"] == "ok"
    assert states["redis"] == states["workers"] == "warn"
    assert list((state / "storage").rglob("*.part")) == []


def test_each_finding_that_needs_one_has_a_remedy(llamahome: RunCommand, state: Path) -> None:
    for check in llamahome("doctor", "--state", state, "--json").json["checks"]:
        assert check["state"] == "ok" or check["remedy"], check


def test_a_changed_base_fails_and_names_both_digests(
    llamahome: RunCommand, state: Path, base_folder: Path
) -> None:
    before = base_digest(base_folder)[:12]
    (base_folder / "model.safetensors").write_bytes(b"other")
    ran = llamahome("doctor", "--state", state)
    assert ran.code == 1
    assert before in ran.out
    assert base_digest(base_folder)[:12] in ran.out
    assert "fail: base tiny: Restore its files" in ran.err


def test_a_base_whose_folder_is_gone_fails(
    llamahome: RunCommand, state: Path, base_folder: Path
) -> None:
    base_folder.rename(base_folder.with_name("moved"))
    ran = llamahome("doctor", "--state", state, "--json")
    assert ran.code == 1
    assert _states(ran.json)["base tiny"] == "fail"


def test_a_redis_that_does_not_answer_fails_without_showing_its_password(
    llamahome: RunCommand, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_REDIS_URL", "redis://user:secret@127.0.0.1:1/0")
    ran = llamahome("doctor", "--state", state)
    assert ran.code == 1
    assert "redis://user:***@127.0.0.1:1/0" in ran.out
    assert "secret" not in ran.out + ran.err


def test_an_unwritable_storage_fails(
    llamahome: RunCommand, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMAHOME_STORAGE_URL", f"file://{tmp_path}/file")
    ran = llamahome("doctor", "--state", state, "--json")
    assert ran.code == 1
    assert _states(ran.json)["storage"] == "fail"


def test_an_open_state_folder_is_warned_about(llamahome: RunCommand, state: Path) -> None:
    state.chmod(0o755)
    assert _states(llamahome("doctor", "--state", state, "--json").json)["state folder"] == "warn"


def test_no_fleet_named_fails_and_says_what_to_name(llamahome: RunCommand) -> None:
    ran = llamahome("doctor")
    assert ran.code == 1
    assert "fail: settings: Run `llamahome up`" in ran.err


@pytest.mark.parametrize(
    ("free", "state"), [(400 * 1024**2, "fail"), (2 * 1024**3, "warn"), (50 * 1024**3, "ok")]
)
def test_little_free_space_is_told_before_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    class Usage:
        total = 100 * 1024**3

    Usage.free = free  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    assert doctor.free_space(tmp_path).state == state


@pytest.mark.parametrize(("ahead", "state"), [(0.0, "ok"), (-7200.0, "warn"), (3.0, "warn")])
def test_a_clock_that_is_off_is_told(state: str, ahead: float, tmp_path: Path) -> None:
    class Elsewhere(Ledger):
        def clock(self) -> float:
            return super().clock() - ahead

    with contextlib.closing(Elsewhere(f"sqlite:///{tmp_path}/l.sqlite3")) as ledger:
        found = doctor.clock(ledger)
    assert found.state == state
    if ahead > 0:
        assert "3.00 s ahead" in found.found or "2.9" in found.found


def test_settings_that_cannot_be_read_are_a_line_like_any_other(
    llamahome: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAHOME_LEDGER_URI", "x")
    ran = llamahome("doctor")
    assert ran.code == 1
    assert "Did you mean 'LLAMAHOME_LEDGER_URL'?" in ran.err


def test_workers_of_every_role_are_counted_and_absent_ones_named(state: Path) -> None:
    settings = load_settings(state=state)
    with contextlib.closing(Ledger(settings.ledger)) as ledger:
        for role in doctor.ROLES[1:]:
            ledger.heartbeat(
                f"{role}-h-1", role=role, host="h", pid=1, state="up", version="0", slots=1,
                metrics_port=None, info={},
            )  # fmt: skip
        found = doctor.workers(ledger)
    assert (found.state, found.remedy) == ("warn", "Start: coordinator")
    assert "1 validation" in found.found


@pytest.mark.model
def test_the_devices_are_what_torch_finds() -> None:
    found = REAL_DEVICES()
    assert found.state == "ok"
    assert re.fullmatch(r"CPU, \d+ threads|.*(NVIDIA|GPU).*", found.found)


def test_a_torch_that_cannot_be_imported_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12 is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = REAL_DEVICES()
    assert found.state == "fail"
    assert "libcudart.so.12 is missing" in found.found
