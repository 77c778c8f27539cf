from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamahome.schemas import JobSpec
from llamahome.training.data import TokenData

pytestmark = pytest.mark.model


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_not_taken_for_another(
    name: str, tera: float | None
) -> None:
    from llamahome.training.gauges import peak_flops

    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_model_flops_are_four_for_a_frozen_weight_and_six_for_a_trained_one() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamahome.training.gauges import Gauges, PeakMemory
    from llamahome.training.runtime import Machine

    machine = Machine(torch.device("cpu"), "fp32", 1, True)
    memory = PeakMemory(machine.device).reader()
    sizes = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32,
        "num_attention_heads": 2,
    }  # fmt: skip
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 8  # attention, feed-forward, three norms
    for tied in (True, False):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
        gauges = Gauges.of(model, 100, machine, memory)
        assert gauges.flops_per_token == 4 * (layer + 32 * 8) + 6 * 100

    read = Gauges(1e9, 1e12, memory).read(tokens=500, seconds=2.0)
    assert (read["tokens_per_second"], read["mfu"]) == (250.0, 0.25)
    assert "mfu" not in gauges.read(1, 1.0)
    assert gauges.read(1, 1.0)["peak_memory_bytes"] > 50 * 1024**2


class Allocator:
    """torch's count on a GPU: what is held now, and the most since it was set back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self.held = self.most = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.reset())

    def reset(self) -> None:
        self.most = self.held

    def pass_of(self, size: int) -> None:
        self.most = max(self.most, self.held + size)


def test_each_job_is_told_the_peak_since_it_was_last_told_though_passes_set_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from llamahome.training.gauges import PeakMemory

    allocator, memory = Allocator(monkeypatch), PeakMemory(torch.device("cuda"))
    one, other = memory.reader(), memory.reader()
    allocator.held = 10
    for size in (90, 30, 50):
        memory.take()
        allocator.pass_of(size)
    assert one.read() == 100
    memory.take()
    allocator.pass_of(20)
    assert one.read() == 30
    assert other.read() == 100
    assert one.read() == other.read() == 10


def test_progress_and_events_carry_what_was_measured_and_the_history_does_not(
    make_spec: Callable[..., JobSpec], prepared_folder: Path, ports: Any
) -> None:
    from llamahome.training.loop import train
    from llamahome.training.runtime import Runtime

    said: dict[str, Any] = {}
    whole = ports.progress

    def progress(done: int, total: int | None, data: Any = None) -> None:
        said.update(data or {})
        whole(done, total, data)

    ports.progress = progress
    trained = train(make_spec(), TokenData.open(prepared_folder), ports, runtime=Runtime("cpu", 1))

    measured = {"tokens_per_second", "peak_memory_bytes"}
    assert measured | {"grad_norm"} <= said.keys()
    [*_, last] = [data for _, _, data in ports.events if "train_loss" in data]
    assert measured | {"grad_norm"} <= last.keys()
    history = (trained.folder / "history.jsonl").read_text()
    assert not any(name in history for name in measured)
