from __future__ import annotations

import pytest

pytestmark = pytest.mark.model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "uint8"])
def test_the_sums_tell_of_any_one_changed_bit_and_of_values_that_changed_places(dtype: str) -> None:
    import torch

    from llamahome.training.model import sums_of

    generator = torch.Generator().manual_seed(1)
    original = torch.randint(0, 200, (7, 300), generator=generator).to(getattr(torch, dtype))
    found = sums_of(original)

    assert sums_of(original.clone()) == found
    assert sums_of(original.t().contiguous().t()) == found
    for place in (0, 1000, 2099):
        changed = original.clone()
        changed.view(-1).view(torch.uint8)[place * original.element_size()] ^= 1
        assert sums_of(changed) != found
    rows = original[[1, 0, *range(2, 7)]]
    assert sums_of(rows) != found


def test_the_sums_do_not_depend_on_how_the_tensor_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from llamahome.training import model

    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = model.sums_of(values)
    monkeypatch.setattr(model, "_SUM_CHUNK", 7)

    assert model.sums_of(values) == whole


def test_a_base_that_changed_by_one_bit_has_another_checksum() -> None:
    import torch

    from llamahome.training.model import checksum

    layer = torch.nn.Linear(3, 4)
    before = checksum(layer)
    with torch.no_grad():
        layer.weight[2, 1] += 1e-6

    assert checksum(layer) != before
