from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.model


def mask(
    seed: int = 1, step: int = 2, micro: int = 3, site: str = "q", rows: range = range(64)
) -> Any:
    import torch

    from llamahome.training.engine.draws import DropKey, Dropout, keep_mask

    key = DropKey(seed, step, micro)
    return keep_mask(key, site, rows, 64, 50, Dropout.of(0.3), torch.device("cpu")).numpy()


def test_draws_depend_on_seed_step_micro_batch_and_layer() -> None:
    one = mask()

    assert np.array_equal(one, mask())
    for other in (mask(seed=2), mask(step=3), mask(micro=4), mask(site="k")):
        assert not np.array_equal(one, other)


def test_a_row_has_the_same_draws_in_a_part_as_in_the_whole() -> None:
    assert np.array_equal(mask(rows=range(20, 64)), mask()[20:])
    assert np.array_equal(mask(rows=range(10)), mask()[:10])


def test_the_draws_of_torch_are_those_of_the_whole_micro_batch_in_each_of_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As CUDA's kernel: where a draw lands depends on how many there are in all."""
    import torch

    from llamahome.training.engine.draws import Dropout, torch_mask

    def bernoulli(full: Any, keep: float, generator: Any) -> Any:
        places = torch.arange(full.numel()).view(full.shape)
        return full.copy_((places * 7919 + 31 * full.numel()) % 1000 < keep * 1000)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", bernoulli)

    def part(rows: range) -> Any:
        return torch_mask(torch.Generator().manual_seed(1), rows, 64, 50, Dropout.of(0.3))

    whole = part(range(64))
    assert 0.6 < float(whole.float().mean()) < 0.8
    for rows in (range(20), range(20, 41), range(41, 64)):
        assert torch.equal(part(rows), whole[rows.start : rows.stop])


def test_the_share_that_is_kept_is_what_was_asked_for() -> None:
    kept = np.mean([mask(step=step) for step in range(200)])

    assert kept == pytest.approx(0.7, abs=0.003)  # 640,000 draws: five standard deviations


def test_rows_and_columns_are_independent() -> None:
    many = np.stack([mask(step=step) for step in range(400)]).astype(float) - 0.7
    flat = many.reshape(400, -1)[:, :300]
    correlation = (flat.T @ flat) / (400 * 0.21)
    np.fill_diagonal(correlation, 0)

    assert float(np.abs(correlation).max()) < 0.3  # 45,000 pairs, each with a deviation of 0.05


def test_start_values_are_pefts_distribution_and_a_function_of_seed_and_layer() -> None:
    from llamahome.training.engine.draws import start_values

    values = start_values(1, "q", 64, 400)

    assert float(values.abs().max()) <= 1 / 20
    assert float(values.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert (values == start_values(1, "q", 64, 400)).all()
    assert not (values == start_values(1, "k", 64, 400)).any()
    assert not (values == start_values(2, "q", 64, 400)).any()
