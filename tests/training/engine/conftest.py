"""A warm base in the test's own process, and jobs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.schemas import JobSpec
from llamahome.training.data import TokenData
from support.engines import Bench


@pytest.fixture
def make_bench(
    make_spec: Callable[..., JobSpec], make_ports: Callable[..., Any], prepared_folder: Path
) -> Callable[..., Bench]:
    def make(precision: str = "fp32", threads: int = 1) -> Bench:
        return Bench(make_spec, make_ports, TokenData.open(prepared_folder), precision, threads)

    return make


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """What a test switches in torch, the next one does not meet."""
    import torch

    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
