"""What goes wrong with one job stays with it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import Stopped, TrainingFailed
from llamahome.schemas import StopReason
from support.engines import Bench, file_bytes

pytestmark = pytest.mark.model

A: dict[str, Any] = {"seed": 1, "lora": {"r": 8}}
B: dict[str, Any] = {"seed": 2, "batch_size": 1, "lora": {"r": 16, "dropout": 0.3}}


def test_a_job_full_of_nan_fails_alone_and_changes_no_bit_of_its_neighbours(bench: Bench) -> None:
    import torch

    expected = {name: file_bytes(end) for name, end in bench.run({"a": A, "b": B}).items()}
    engine = bench.engine()
    ended: dict[str, Any] = {}
    bench.admit(engine, "a", ended, **A)
    bench.admit(engine, "poison", ended, seed=3, epochs=8, lora={"target_modules": "all-linear"})
    bench.admit(engine, "b", ended, **B)
    poisoned = engine.slots()[1]
    for _ in range(4):
        engine.tick(wait=True)
    with torch.no_grad():
        poisoned.weights.fill_(float("nan"))
    engine.run()
    engine.close()

    assert isinstance(ended["poison"], TrainingFailed)
    assert ended["poison"].code == "nan_loss"
    assert {name: file_bytes(ended[name]) for name in ("a", "b")} == expected


def test_a_dropout_next_to_one_drops_almost_all_and_breaks_nothing(bench: Bench) -> None:
    expected = file_bytes(bench.run({"b": B})["b"])
    ends = bench.run({"a": {"lora": {"dropout": 0.999999}}, "b": B})

    assert not isinstance(ends["a"], Exception)
    assert file_bytes(ends["b"]) == expected


def test_a_new_slot_is_never_taken_for_one_that_is_gone(bench: Bench) -> None:
    """The grouped tier keeps stacked copies of weights for as long as the slots' key is equal."""
    import torch

    from llamahome.training.engine.slots import Slot

    keys = set()
    for _ in range(20):
        slot = Slot.without_layers(torch.device("cpu"), torch.float32)
        keys.add(slot.serial)
        del slot  # its id() is free for the next one

    assert len(keys) == 20


def test_weights_that_are_not_finite_in_the_end_are_not_published(bench: Bench) -> None:
    """BEHAVIOUR 76: the last step may overshoot, and no further loss tells."""
    settings = {"epochs": 1, "learning_rate": 1e300, "validation_split": 0}
    end = bench.run({"a": settings})["a"]

    assert isinstance(end, TrainingFailed)
    assert end.code == "nan_loss"


def test_an_error_of_one_job_is_its_own() -> None:
    from llamahome.training.engine.answers import answer
    from llamahome.training.wire import Failed

    told = answer("a", RuntimeError("no such thing"))

    assert isinstance(told, Failed)
    assert not told.fatal


def test_one_cancelled_in_the_middle_of_its_window_changes_nothing_for_the_other(
    bench: Bench,
) -> None:
    expected = file_bytes(bench.run({"b": B})["b"])
    engine = bench.engine(tick_tokens=1)  # a unit a tick
    ended: dict[str, Any] = {}
    ports = bench.admit(engine, "a", ended, gradient_accumulation_steps=4)
    bench.admit(engine, "b", ended, **B)
    for _ in range(9):
        engine.tick(wait=True)
    ports.stop_at[ports.done] = StopReason.cancel
    engine.run()
    engine.close()

    assert isinstance(ended["a"], Stopped)
    assert ended["a"].code == "cancel"
    assert file_bytes(ended["b"]) == expected


def test_one_whose_disk_is_full_fails_alone_with_its_last_checkpoint_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEHAVIOUR 76: a full disk."""
    from llamahome.training.engine import saving

    expected = file_bytes(bench.run({"b": B})["b"])
    engine = bench.engine()
    ended: dict[str, Any] = {}
    ports = bench.admit(engine, "a", ended, **A)
    bench.admit(engine, "b", ended, **B)
    save = saving.save_checkpoint

    def full_for_one(root: Path, snapshot: Any) -> Path:
        if root.parent == ports.scratch and snapshot.state.step > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(root, snapshot)

    monkeypatch.setattr(saving, "save_checkpoint", full_for_one)
    engine.run()
    engine.close()

    assert isinstance(ended["a"], OSError)
    assert list(ports.kept) == [3]
    assert file_bytes(ended["b"]) == expected


def _limit(bench: Bench, tokens: int, *, recomputed: bool) -> int:
    """The bytes that a pass of so many tokens takes."""
    engine = bench.engine(memory_bytes=1)
    layers = engine.warm.recomputation.most if recomputed else 0
    needed = engine.memory.needs(tokens, layers)
    engine.close()
    return needed


def test_out_of_memory_together_they_go_on_in_smaller_ticks_with_the_same_bytes(
    bench: Bench,
) -> None:
    """BEHAVIOUR 65, 76: what need not fail for lack of memory does not."""
    expected = {name: file_bytes(end) for name, end in bench.run({"a": A, "b": B}).items()}
    engine = bench.engine(memory_bytes=_limit(bench, 48, recomputed=True))
    ended: dict[str, Any] = {}
    ports = bench.admit(engine, "a", ended, **A)
    bench.admit(engine, "b", ended, **B)
    ticks = []
    while engine.busy:
        engine.tick(wait=True)
        ticks.append(engine.tick_tokens)
    engine.close()

    assert min(ticks) < 1024
    assert ticks[-1] == 1024, "whoever comes next is not held to what did not fit then"
    assert any("Out of memory with" in message for message in ports.messages("warn"))
    assert {name: file_bytes(end) for name, end in ended.items()} == expected


def test_out_of_memory_within_a_micro_batch_it_is_cut_between_rows(bench: Bench) -> None:
    from support.engines import largest_gap

    job = {"batch_size": 8, "gradient_accumulation_steps": 1, "lora": {"dropout": 0.2}}
    whole = bench.run({"a": job})["a"]
    cut = bench.run({"a": job}, memory_bytes=_limit(bench, 24, recomputed=True))["a"]

    assert file_bytes(cut)
    assert largest_gap(whole, cut) < 1e-5  # the same draws; sums in another order


def test_that_one_has_its_micro_batches_cut_changes_no_bit_of_its_neighbour(bench: Bench) -> None:
    """And of a job that comes after it."""
    small = {"seed": 2, "batch_size": 3, "gradient_accumulation_steps": 1}
    large = {"batch_size": 11, "gradient_accumulation_steps": 1, "epochs": 1}
    expected = file_bytes(bench.run({"small": small})["small"])
    limit = _limit(bench, 60, recomputed=True)  # three rows and not eleven

    both = bench.run({"large": large, "small": small}, memory_bytes=limit)
    engine = bench.engine(memory_bytes=limit)
    ended: dict[str, Any] = {}
    for name, job in (("large", large), ("small", small)):
        bench.admit(engine, name, ended, **job)
        engine.run()
    engine.close()

    assert file_bytes(both["large"])
    assert file_bytes(both["small"]) == expected
    assert file_bytes(ended["small"]) == expected


def test_a_row_that_does_not_fit_by_itself_fails_its_job_and_no_other(
    bench: Bench, make_prepared: Callable[..., Path]
) -> None:
    """BEHAVIOUR 76: out of memory."""
    from llamahome.training.data import TokenData

    long = TokenData.open(make_prepared(training=6, validation=0, longest=40))
    small = TokenData.open(make_prepared(training=6, validation=0, longest=8))
    limit = _limit(bench, 12, recomputed=True)
    ended = bench.run({"big": {"data": long}, "small": {"data": small}}, memory_bytes=limit)

    assert isinstance(ended["big"], TrainingFailed)
    assert ended["big"].code == "out_of_memory"
    assert "max_length" in str(ended["big"])
    assert file_bytes(ended["small"])


def test_a_callback_into_the_ports_that_fails_ends_its_job_only(bench: Bench) -> None:
    expected = file_bytes(bench.run({"b": B})["b"])
    engine = bench.engine()
    ended: dict[str, Any] = {}
    ports = bench.admit(engine, "a", ended, **A)
    bench.admit(engine, "b", ended, **B)

    def fail(done: int) -> None:
        if done == 2:
            raise RuntimeError("broken")

    ports.on_progress = fail
    engine.run()
    engine.close()

    assert isinstance(ended["a"], RuntimeError)
    assert file_bytes(ended["b"]) == expected


def test_a_job_whose_adapter_does_not_fit_is_refused_as_out_of_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from llamahome.training.engine import warm

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for 1 GB")

    engine = bench.engine()
    monkeypatch.setattr(warm, "Slot", no_room)
    with pytest.raises(TrainingFailed, match="no room") as caught:
        bench.admit(engine, "a", {})
    engine.close()

    assert caught.value.code == "out_of_memory"
    assert not engine.busy
