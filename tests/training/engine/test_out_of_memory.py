"""A lack of memory, whoever tells of it and wherever it comes up."""

from __future__ import annotations

from typing import Any

import pytest

from llamahome.errors import TrainingFailed
from support.engines import Bench, file_bytes

pytestmark = pytest.mark.model

A: dict[str, Any] = {"seed": 1, "lora": {"r": 8}}
B: dict[str, Any] = {"seed": 2, "batch_size": 1, "lora": {"r": 16, "dropout": 0.3}}


def _of_a_device() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 160.00 MiB")


def _of_the_host() -> None:
    import torch

    torch.empty(10**15)


def _of_python() -> None:
    raise MemoryError


LACKS = {"device": _of_a_device, "host": _of_the_host, "python": _of_python}
every_lack = pytest.mark.parametrize("lack", list(LACKS.values()), ids=list(LACKS))


@every_lack
def test_in_a_pass_together_it_means_smaller_passes_and_the_same_bytes(
    bench: Bench, lack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: file_bytes(end) for name, end in bench.run({"a": A, "b": B}).items()}
    engine = bench.engine()
    ended: dict[str, Any] = {}
    run = engine.warm.run

    def alone_only(units: Any) -> Any:
        if len({id(unit.slot) for unit in units}) > 1:
            lack()
        return run(units)

    monkeypatch.setattr(engine.warm, "run", alone_only)
    for name, job in (("a", A), ("b", B)):
        bench.admit(engine, name, ended, **job)
    engine.run()
    engine.close()

    assert {name: file_bytes(end) for name, end in ended.items()} == expected


@every_lack
def test_between_two_passes_it_ends_its_job_as_such(
    bench: Bench, lack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.training.engine import job

    monkeypatch.setattr(job, "write_result", lambda _: lack())
    end = bench.run({"a": A})["a"]

    assert isinstance(end, TrainingFailed)
    assert end.code == "out_of_memory"


@every_lack
def test_in_the_last_look_at_the_base_it_ends_its_job_only(
    bench: Bench, lack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamahome.training.engine import ticks

    monkeypatch.setattr(ticks, "checksum", lambda _: lack())
    end = bench.run({"a": A})["a"]

    assert isinstance(end, TrainingFailed)
    assert end.code == "out_of_memory"


@every_lack
@pytest.mark.parametrize("what", ["gradient's copy", "moments"])
def test_all_that_a_slot_ever_needs_is_had_at_its_admission_or_it_is_refused(
    bench: Bench, lack: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from llamahome.training.engine import optimizer, slots

    class NoMore:
        """torch without room for another tensor."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def zeros_like(self, *_: Any, **__: Any) -> None:
            lack()

    engine = bench.engine()
    monkeypatch.setattr(slots if what == "gradient's copy" else optimizer, "torch", NoMore())
    with pytest.raises(TrainingFailed) as caught:
        bench.admit(engine, "a", {}, **A)
    engine.close()

    assert caught.value.code == "out_of_memory"
    assert not engine.busy


def test_the_moments_of_the_last_step_lie_where_they_were_made(bench: Bench) -> None:
    from llamahome.config import parse_training_config
    from llamahome.training.engine.optimizer import SlotOptimizer

    engine = bench.engine()
    config = parse_training_config(bench.spec(**A).config, source="test")
    slot = engine.warm.slot_for(config)
    optimizer = SlotOptimizer(slot, config)
    state = optimizer.adamw.state[slot.weights]
    before = {name: tensor.data_ptr() for name, tensor in state.items()}

    assert optimizer.tensors() == {}, "nothing to keep before a step was taken"
    slot.gradient.fill_(float("nan"))
    optimizer.step(1.0, 1e-3)
    assert optimizer.tensors() == {}, "a step that was skipped is none"
    slot.gradient.fill_(1.0)
    optimizer.step(1.0, 1e-3)
    taken = optimizer.tensors()
    other = SlotOptimizer(engine.warm.slot_for(config), config)
    other.restore(taken)
    engine.close()

    assert {name: tensor.data_ptr() for name, tensor in state.items()} == before
    assert set(before) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(taken["step"]) == 1.0
    again = other.tensors()
    assert again.keys() == taken.keys()
    assert all(bool((again[name] == taken[name]).all()) for name in taken)


def test_the_check_before_the_first_step_is_done_in_smaller_passes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = file_bytes(bench.run({"b": B})["b"])
    engine = bench.engine()
    ended: dict[str, Any] = {}
    run = engine.warm.run

    def one_row_only(units: Any) -> Any:
        if any(len(unit.rows) > 1 for unit in units):
            _of_a_device()
        return run(units)

    monkeypatch.setattr(engine.warm, "run", one_row_only)
    bench.admit(engine, "b", ended, **B)  # of a row each; the check's are two
    engine.run()
    engine.close()

    assert file_bytes(ended["b"]) == expected
    assert ended["b"].report.proofs["factoring"]["gradient_gap"] < 1e-5


@every_lack
def test_where_a_gradient_cannot_be_kept_the_pass_is_not_done_and_nobody_is_harmed(
    bench: Bench, lack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: file_bytes(end) for name, end in bench.run({"a": A, "b": B}).items()}
    engine = bench.engine()
    ended: dict[str, Any] = {}
    for name, job in (("a", A), ("b", B)):
        bench.admit(engine, name, ended, **job)
    second = engine.slots()[1]
    keep, tried = second.keep_gradient, []

    def keep_later() -> None:
        tried.append(True)
        if len(tried) in (3, 4):
            lack()
        keep()

    monkeypatch.setattr(second, "keep_gradient", keep_later)
    engine.run()
    engine.close()

    assert len(tried) > 4
    assert {name: file_bytes(end) for name, end in ended.items()} == expected
