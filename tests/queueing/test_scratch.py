"""Attempts' local folders: guarded while their worker lives, removed when it is gone."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llamahome.config import Settings
from llamahome.errors import Unavailable
from llamahome.ledger import Ledger
from llamahome.queueing.crowd import Crowd
from llamahome.queueing.runner import StageRunner
from llamahome.queueing.scratch import Scratch
from llamahome.schemas import JobSpec, JobState, Ports, Stage, StageResult, StageTask
from support.stages import CountingStage

MakeRunner = Callable[..., StageRunner]
MakeSpec = Callable[..., JobSpec]

# A worker that makes its folder, says so, and lives until it is killed.
HOLD = (
    "import sys, time; from pathlib import Path; from llamahome.queueing.scratch import Scratch;"
    "holding = Scratch(Path(sys.argv[1])).folder(); folder = holding.__enter__();"
    "(folder / 'big').write_bytes(bytes(1000)); (folder / 'below').mkdir();"
    "print(folder, flush=True); time.sleep(600)"
)


def _holder(root: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_attempt_left_is_removed_and_what_lives_stays(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    dead, left = _holder(root)
    alive, kept = _holder(root)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        (root / "something else").mkdir()
        with Scratch(root).folder() as own:
            Scratch(root).sweep()
            assert own.is_dir(), "of this process's own, in another thread"
            assert (kept / "big").stat().st_size == 1000
            assert not left.exists()
    finally:
        for process in (alive, dead):
            process.kill()
            process.communicate()
    assert sorted(path.name for path in root.iterdir()) == sorted([kept.name, "something else"])


def test_many_that_make_and_sweep_at_once_never_take_each_others(tmp_path: Path) -> None:
    lost: list[BaseException] = []

    def work() -> None:
        mine = Scratch(tmp_path / "scratch")
        try:
            for _ in range(60):
                mine.sweep()
                with mine.folder() as folder:
                    (folder / "file").write_text("x")
                    mine.sweep()
                    assert (folder / "file").read_text() == "x"
        except BaseException as error:  # handed to the test's own thread
            lost.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert list((tmp_path / "scratch").iterdir()) == []


def test_leftovers_that_cannot_be_removed_do_not_stop_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attempt-left").mkdir()

    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    Scratch(tmp_path).sweep()
    assert (tmp_path / "attempt-left").is_dir()


def test_room_that_leftovers_took_is_free_before_the_next_attempt_is_claimed(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    settings: Settings,
) -> None:
    left = settings.scratch_root / "attempt-of-a-killed-worker"
    left.mkdir(parents=True)
    (left / "big").write_bytes(bytes(1000))
    seen: list[bool] = []

    def function(task: StageTask, ports: Ports) -> StageResult:
        seen.append(left.exists())
        return StageResult()

    ledger.submit(make_spec())
    assert make_runner(function=function).work() >= 1
    assert seen[0] is False
    assert list(settings.scratch_root.iterdir()) == []


def test_a_worker_with_a_broken_scratch_folder_claims_nothing(
    ledger: Ledger,
    make_runner: MakeRunner,
    make_spec: MakeSpec,
    settings: Settings,
    stage: CountingStage,
) -> None:
    job, _ = ledger.submit(make_spec())
    settings.scratch_root.write_text("the volume is gone")
    for _ in range(5):
        with pytest.raises(Unavailable, match="scratch") as refused:
            make_runner().work()
        assert refused.value.code == "scratch_unusable"
        assert str(settings.scratch_root) in str(refused.value)
    assert ledger.runs(job.id)[0].attempts == ()
    assert ledger.job(job.id).state is JobState.accepted

    settings.scratch_root.unlink()
    for each in Stage:
        make_runner(each).work()
    assert ledger.job(job.id).state is JobState.succeeded


def test_so_does_a_crowd_of_several_slots(
    ledger: Ledger, make_runner: MakeRunner, make_spec: MakeSpec, settings: Settings
) -> None:
    job, _ = ledger.submit(make_spec())
    for each in (Stage.validation, Stage.preprocessing):
        make_runner(each).work()
    settings.scratch_root.rmdir()
    settings.scratch_root.write_text("the volume is gone")
    with pytest.raises(Unavailable, match="scratch"):
        Crowd(make_runner(Stage.training), 4, settings).work()
    assert ledger.runs(job.id)[-1].attempts == ()


def test_a_full_disk_is_found_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full refuses every write as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb", buffering=0))
    with pytest.raises(Unavailable, match="No space left on device") as refused:
        Scratch(tmp_path).check()
    assert refused.value.code == "scratch_unusable"
