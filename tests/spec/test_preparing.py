"""``process_samples``: the prepared set, whole or not at all; the split; progress; a live loop."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from llamahome.conversations.tokens import read_token_rows
from llamahome.errors import CorruptArtifact, InvalidData, InvalidState
from llamahome.local import TrainingData
from llamahome.local.tree import recover, replace_folder

from .conftest import QUICK, MakeData, contents, conversation, write_samples

LLAMA = "llama_3.3-7b"


def ids_of(folder: Path, side: str) -> list[tuple[int, ...]]:
    rows = read_token_rows(folder / f"{side}.safetensors")
    return [tuple(rows.row(index)[0].tolist()) for index in range(len(rows))]


@pytest.mark.asyncio
async def test_two_at_once_give_one_whole_set_and_a_rerun_changes_nothing(
    make_data: MakeData,
) -> None:
    """BEHAVIOUR 12: two managers with other settings at once leave one of the two sets, whole."""
    root = make_data("flat")
    wishes = [{**QUICK, "max_length": 25}, {**QUICK, "max_length": 64}]
    alone = []
    for wish in wishes:
        await TrainingData(root, config=wish).process_samples()
        alone.append(contents(root / "processed" / LLAMA))
    assert alone[0] != alone[1]
    for _ in range(3):
        managers = [TrainingData(root, config=wish) for wish in wishes]
        await asyncio.gather(*(manager.process_samples() for manager in managers))
        assert contents(root / "processed" / LLAMA) in alone
        assert [path.name for path in (root / "processed").iterdir() if path.is_dir()] == [LLAMA]
    place = root / "processed" / LLAMA / "manifest.json"
    before = place.stat().st_ino, contents(place.parent)
    await managers[alone.index(before[1])].process_samples()
    assert (place.stat().st_ino, contents(place.parent)) == before


@pytest.mark.asyncio
async def test_a_damaged_set_is_made_whole_by_processing_again(make_data: MakeData) -> None:
    """BEHAVIOUR 12: equal manifests do not make equal sets: every file is looked at."""
    root = make_data("flat")
    manager = TrainingData(root, config=QUICK)
    place = Path((await manager.process_samples()).folder)
    whole = contents(place)
    shard = whole["training.safetensors"]
    for name, damaged in (
        ("training.safetensors", None), ("training.safetensors", shard[:-1] + b"?"),
        ("packs.safetensors", b""), ("tokenizer/tokenizer.json", b"{}"), ("tokenizer", b""),
    ):  # fmt: skip
        spoilt = place / name
        shutil.rmtree(spoilt) if spoilt.is_dir() else spoilt.unlink()
        if damaged is not None:
            spoilt.write_bytes(damaged)
        await manager.process_samples()
        assert contents(place) == whole, name


def test_two_processes_at_once_give_one_whole_set(make_data: MakeData) -> None:
    """BEHAVIOUR 12: two processes on one folder, as two machines would be."""
    root = make_data("flat")
    asyncio.run(TrainingData(root, config=QUICK).process_samples())
    alone = contents(root / "processed" / LLAMA)
    shutil.rmtree(root / "processed")
    code = (
        "import asyncio, json, sys; from llamahome.local import TrainingData;"
        "manager = TrainingData(sys.argv[1], config=json.loads(sys.argv[2]));"
        "sys.stdin.read(); asyncio.run(manager.process_samples())"
    )
    words = [sys.executable, "-c", code, str(root), json.dumps(QUICK)]
    both = [subprocess.Popen(words, stdin=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait() for process in both] == [0, 0]
    assert contents(root / "processed" / LLAMA) == alone
    assert not list((root / "processed").glob(".work-*"))


def test_what_a_killed_process_left_is_removed_and_a_half_done_swap_undone(
    make_data: MakeData, tmp_path: Path
) -> None:
    """BEHAVIOUR 12: no leftover of a crash stays, or is taken for a set."""
    root = make_data("flat")
    dead = root / "processed" / ".work-dead"
    dead.mkdir(parents=True)
    (dead / "half").write_text("")
    asyncio.run(TrainingData(root).process_samples())
    assert not dead.exists()
    place, new = tmp_path / "place", tmp_path / "new"
    for folder in (place, new):
        folder.mkdir()
        (folder / folder.name).write_text("")
    replace_folder(new, place)
    assert ([path.name for path in place.iterdir()], new.exists()) == (["new"], False)
    place.rename(tmp_path / ".place.replaced")
    recover(place)
    assert [path.name for path in place.iterdir()] == ["new"]


@pytest.mark.asyncio
async def test_a_set_is_never_put_over_something_else_and_a_changed_one_is_not_trained_on(
    make_data: MakeData,
) -> None:
    """BEHAVIOUR 12: foreign folders, two models of one joined name, and bytes that were changed."""
    root = make_data("flat", models=("a_b/c", "a/b_c"))
    manager = TrainingData(root, config=QUICK)
    (root / "processed" / "a_b_c").mkdir(parents=True)
    with pytest.raises(InvalidState, match="no prepared set"):
        await manager.process_samples("a_b", "c")
    (root / "processed" / "a_b_c").rmdir()
    await manager.process_samples("a_b", "c")
    with pytest.raises(InvalidState, match="'a_b' 'c'") as caught:
        await manager.process_samples("a", "b_c")
    assert caught.value.code == "name_taken"
    damaged = root / "processed" / "a_b_c" / "preparation.json"
    damaged.chmod(0o644)
    damaged.write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"preparation\.json.*process_samples"):
        await manager.train_model("a_b", "c")
    assert not (root / "checkpoints" / "a_b_c" / "checkpoints").exists()


@pytest.mark.asyncio
async def test_the_report_counts_rows_and_tokens_of_both_sides(make_data: MakeData) -> None:
    """BEHAVIOUR 55: counts, token minimum, mean and maximum, truncated, padded share, per side."""
    root = make_data("flat", rows=20)
    path = write_samples(root / "samples", [conversation(0)], "b.jsonl")
    path.write_text(path.read_text() + "{}\n")
    report = await TrainingData(root, config={**QUICK, "max_length": 26}).process_samples()
    assert report.validation is not None
    assert report.preparation is not None
    assert (report.validation.total, report.validation.valid) == (22, 21)
    assert report.validation.duplicates == 1
    for side in ("training", "validation"):
        lengths = [len(ids) for ids in ids_of(Path(report.folder), side)]
        found = report.metrics[side]
        assert (found.rows, found.shortest, found.longest) == (
            len(lengths), min(lengths), max(lengths),
        )  # fmt: skip
        assert np.isclose(found.mean, np.mean(lengths))
        assert np.isclose(found.padded_share, 1 - sum(lengths) / (26 * len(lengths)))
    assert report.preparation.truncated_rows > 0
    written = json.loads((Path(report.folder) / "report.json").read_text())
    assert written["metrics"] == {k: v.model_dump() for k, v in report.metrics.items()}
    quarantine = (Path(report.folder) / "quarantine.jsonl").read_text().splitlines()
    assert [(row["file"], row["line"]) for row in map(json.loads, quarantine)] == [("b.jsonl", 2)]


@pytest.mark.asyncio
async def test_the_split_is_a_function_of_the_samples_and_the_seed(
    make_data: MakeData, tmp_path: Path
) -> None:
    """BEHAVIOUR 56, 57, 60: 90 of 100; the same however the samples are named, ordered or cut into
    shards; the sides are disjoint, together all, and validation is not the tail."""
    whole = make_data("whole", rows=100)
    report = await TrainingData(whole, config=QUICK).process_samples()
    place = Path(report.folder)
    sides = [ids_of(place, side) for side in ("training", "validation")]
    assert [len(rows) for rows in sides] == [90, 10]
    assert not set(sides[0]) & set(sides[1])
    assert len(set(sides[0]) | set(sides[1])) == 100
    lines = read_token_rows(place / "validation.safetensors").source_line
    assert min(lines) <= 90
    cut = make_data("cut", rows=0)
    for number in range(100):
        name = f"{(number * 37) % 100:03}.jsonl"
        write_samples(cut / "samples", [conversation(number)], name)
    again = await TrainingData(cut, config=QUICK).process_samples()
    assert [ids_of(Path(again.folder), side) for side in ("training", "validation")] == sides
    other = await TrainingData(whole, config={**QUICK, "seed": 43}).process_samples()
    assert set(ids_of(Path(other.folder), "validation")) != set(sides[1])


@pytest.mark.asyncio
async def test_shards_of_any_size_give_the_same_set(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 60: the split is over samples, so the set does not depend on how many shards, and
    so workers, there were."""
    root = make_data("flat", rows=30)
    sets = []
    for size in ("4194304", "500"):
        monkeypatch.setenv("LLAMAHOME_SHARD_BYTES", size)
        report = await TrainingData(root, config=QUICK).process_samples()
        sets.append(contents(Path(report.folder)))
    assert sets[0] == sets[1]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("rows", "share", "held"),
    [(10, 0.0, 0), (1, 0.1, 0), (2, 0.1, 1), (9, 0.1, 1), (100, 0.29, 29)],
)
async def test_small_sets_and_odd_shares_are_split_exactly(
    make_data: MakeData, caplog: pytest.LogCaptureFixture, rows: int, share: float, held: int
) -> None:
    """BEHAVIOUR 58, 59: none for a share of 0 or a single sample, with a warning; one of two to
    nine; 29 of 100 at 0.29."""
    root = make_data("flat", rows=rows)
    report = await TrainingData(root, config={**QUICK, "validation_split": share}).process_samples()
    assert report.preparation is not None
    sides = report.preparation.training.rows, report.preparation.validation.rows
    assert sides == (rows - held, held)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (held == 0) == any("no early stopping" in message for message in warned)


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_samples_are_processed(make_data: MakeData) -> None:
    """BEHAVIOUR 63: another coroutine makes progress meanwhile."""
    root = make_data("flat", rows=500)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    await TrainingData(root, config=QUICK).process_samples()
    ticking.cancel()
    assert ticks >= 20


@pytest.mark.asyncio
async def test_a_cancel_leaves_no_partial_set_and_no_process(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 63: cancelled in the middle of tokenising, the folder is as it was before."""
    root = make_data("flat", rows=3000)
    manager = TrainingData(root, config=QUICK)
    small = [conversation(1), conversation(2)]
    full = (root / "samples" / "a.jsonl").read_bytes()
    write_samples(root / "samples", small)
    await manager.process_samples()
    before = contents(root / "processed")
    children = psutil.Process(os.getpid()).children(recursive=True)
    (root / "samples" / "a.jsonl").write_bytes(full)
    at_work = asyncio.Event()
    hold = threading.Event()
    loop = asyncio.get_running_loop()

    from llamahome.preprocessing import stage

    real = stage.tokenise_shard

    def held(*values: Any) -> Any:
        loop.call_soon_threadsafe(at_work.set)
        hold.wait()
        return real(*values)

    monkeypatch.setattr(stage, "tokenise_shard", held)
    running = asyncio.ensure_future(manager.process_samples())
    try:
        await at_work.wait()
        running.cancel()
        await asyncio.sleep(0)
        assert not running.done()  # it leaves when the work has ended, not before
        running.cancel()
    finally:
        hold.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert contents(root / "processed") == before
    assert not list((root / "processed").glob(".work-*"))
    assert psutil.Process(os.getpid()).children(recursive=True) == children


@pytest.mark.asyncio
async def test_a_failure_leaves_nothing_behind(make_data: MakeData) -> None:
    """BEHAVIOUR 63: nor does an error; the earlier set stays as it was."""
    root = make_data("flat")
    manager = TrainingData(root, config=QUICK)
    await manager.process_samples()
    before = contents(root / "processed")
    (root / "samples" / "a.jsonl").write_text("{}\n[]\n")
    with pytest.raises(InvalidData, match="none of 2 rows"):
        await manager.process_samples()
    assert contents(root / "processed") == before
    assert not list((root / "processed").glob(".work-*"))


@pytest.mark.asyncio
@pytest.mark.parametrize("terminal", [True, False])
async def test_loading_is_shown_by_file_on_a_terminal_and_not_off_one(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """BEHAVIOUR 64: "Loading samples..." counts files, is complete though some are bad, and draws
    nothing off a terminal."""
    from llamahome.local import bars, training_data

    root = make_data("flat", rows=5)
    (root / "samples" / "b.jsonl").write_text("not json\n")
    (root / "samples" / "c.jsonl").write_text("")
    out = io.StringIO()
    monkeypatch.setattr(
        bars, "progress_console", lambda: Console(file=out, force_terminal=terminal, width=120)
    )
    made: list[bars.SampleBars] = []
    real: Callable[..., bars.SampleBars] = bars.SampleBars
    monkeypatch.setattr(
        training_data, "SampleBars", lambda files: made.append(real(files)) or made[-1]
    )
    await TrainingData(root, config=QUICK).process_samples()
    [task, _] = made[0].progress.tasks
    assert (task.description, task.total, task.completed) == ("Loading samples...", 3, 3)
    assert ("Loading samples..." in out.getvalue()) == terminal
    assert terminal or out.getvalue() == ""


@pytest.mark.asyncio
async def test_a_disk_that_is_full_from_the_start_leaves_nothing_behind(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 63: not the folder that could not even be held, and it can be tried again."""
    root = make_data("flat")

    def full(*values: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            await TrainingData(root, config=QUICK).process_samples()
    assert [path.name for path in (root / "processed").iterdir()] == [".lock"]
    await TrainingData(root, config=QUICK).process_samples()


def test_folders_of_work_do_not_meet_however_often_they_come_and_go(tmp_path: Path) -> None:
    """BEHAVIOUR 12: two managers on one folder."""
    from concurrent.futures import ThreadPoolExecutor

    from llamahome.local.tree import work_folder

    def come_and_go(_: int) -> None:
        for _ in range(100):
            with work_folder(tmp_path) as folder:
                assert folder.is_dir()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))

    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
