from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from llamahome.conversations.tokens import TokenRow, TokenRows, read_token_rows, write_token_rows

if TYPE_CHECKING:
    from llamahome.training.engine.slots import Slot

pytestmark = pytest.mark.model


@pytest.fixture
def rows(tmp_path: Path) -> TokenRows:
    given = (
        ([10, 11, 12, 13], [0, 0, 1, 1]),
        ([20, 21], [0, 1]),
        ([30, 31, 32, 33, 34], [1, 1, 1, 0, 0]),
        ([40, 41], [1, 0]),
    )
    path = tmp_path / "rows.safetensors"
    write_token_rows(
        path, [TokenRow(np.array(i, np.int32), np.array(t, np.bool_)) for i, t in given]
    )
    return read_token_rows(path)


@pytest.fixture
def slot() -> Slot:
    import torch

    from llamahome.training.engine.slots import Slot

    return Slot.without_layers(torch.device("cpu"), torch.float32)


@pytest.fixture
def make_unit(rows: TokenRows, slot: Slot) -> Callable[..., Any]:
    from llamahome.training.engine.passes import make_unit

    def make(samples: list[int], weight: float = 1.0) -> Any:
        return make_unit(slot, rows, samples, weight=weight, learns=True)

    return make


def test_a_place_has_a_label_where_the_token_after_it_is_trained(
    make_unit: Callable[..., Any],
) -> None:
    unit = make_unit([0, 1])

    assert [row.tolist() for row in unit.rows] == [[10, 11, 12], [20]]
    assert unit.places.tolist() == [1, 2, 3]
    assert unit.targets.tolist() == [12, 13, 21]


def test_what_no_loss_depends_on_is_left_out(make_unit: Callable[..., Any]) -> None:
    unit = make_unit([2, 3])

    # The first row's tail is not trained, and nothing predicts the second row's only trained token.
    assert [row.tolist() for row in unit.rows] == [[30, 31]]
    assert unit.targets.tolist() == [31, 32]


def test_rows_can_be_cut_but_not_before_their_first_label(rows: TokenRows, slot: Slot) -> None:
    from llamahome.training.engine.passes import make_unit

    unit = make_unit(slot, rows, [0, 2], weight=1.0, learns=False, most_tokens=1)

    assert [row.tolist() for row in unit.rows] == [[10, 11], [30]]
    assert unit.targets.tolist() == [12, 31]


def test_a_pass_lays_units_end_to_end_and_fills_up_to_the_block(
    make_unit: Callable[..., Any],
) -> None:
    import torch

    from llamahome.training.engine.passes import make_pass

    whole = make_pass([make_unit([0], 0.5), make_unit([2, 1], 0.25)], 8, torch.device("cpu"))

    assert whole.ids.tolist() == [10, 11, 12, 30, 31, 20, 0, 0]
    assert whole.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert whole.lengths == (3, 2, 1)
    assert whole.places.tolist() == [1, 2, 3, 4, 5]
    assert whole.targets.tolist() == [12, 13, 31, 32, 21]
    assert whole.weights.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert [(s.start, s.end, s.first_label, s.last_label) for s in whole.segments] == [
        (0, 3, 0, 2),
        (3, 6, 2, 5),
    ]
    assert whole.tokens == 6


def test_the_parts_of_a_unit_make_up_the_whole(make_unit: Callable[..., Any]) -> None:
    from llamahome.training.engine.passes import split_unit

    unit = make_unit([0, 2, 1, 2])
    parts = split_unit(unit, 4)

    assert [part.tokens for part in parts] == [3, 3, 2]
    assert [part.first for part in parts] == [0, 3, 6]
    assert [part.targets.tolist() for part in parts] == [[12, 13], [31, 32, 21], [31, 32]]
    assert [part.places.tolist() for part in parts] == [[1, 2], [0, 1, 2], [0, 1]]
    assert [part.tokens for part in split_unit(unit, 1)] == [3, 2, 1, 2]
    again = split_unit(parts[1], 2)
    assert [part.first for part in again] == [3, 5]
    assert {part.micro_batch_tokens for part in [unit, *parts, *again]} == {unit.tokens}
