from __future__ import annotations

import math

from llamahome.config import TrainingConfig
from llamahome.training.stopping import EarlyStopping


def told(losses: list[float], **early: object) -> tuple[EarlyStopping, list[bool], int | None]:
    """The stopping after each loss in turn; which were best; the evaluation (from 1) it ended."""
    config = TrainingConfig.model_validate({"early_stopping": early})
    stopping, bests = EarlyStopping(), []
    for number, loss in enumerate(losses, 1):
        bests.append(stopping.update(loss, number, config))
        if stopping.reason:
            return stopping, bests, number
    return stopping, bests, None


def test_it_stops_at_the_patience_th_evaluation_in_a_row_without_improvement() -> None:
    """BEHAVIOUR 71: patience."""
    stopping, _, ended = told([2.0, 2.1, 2.2, 2.3, 1.0], patience=3, min_delta=0.01)

    assert ended == 4
    assert stopping.reason is not None
    assert "3 evaluations" in stopping.reason


def test_an_improvement_resets_the_counter() -> None:
    """BEHAVIOUR 71: the counter."""
    _, _, ended = told([2.0, 2.1, 2.1, 1.9, 2.0, 2.0], patience=3, min_delta=0.01)

    assert ended is None


def test_exactly_min_delta_is_no_improvement_whatever_binary_makes_of_it() -> None:
    """BEHAVIOUR 71: exactly min_delta."""
    for reference in (1.0, 0.5, 2.3, 3.21, 6.0):
        _, _, ended = told([reference, round(reference - 0.01, 2)], patience=1, min_delta=0.01)
        assert ended == 2, reference


def test_slow_gains_that_add_up_are_an_improvement() -> None:
    """BEHAVIOUR 71: slow steady gains."""
    losses = [2.0 - 0.004 * i for i in range(12)]

    _, _, ended = told(losses, patience=3, min_delta=0.01)

    assert ended is None


def test_the_best_is_the_lowest_even_where_it_is_no_improvement() -> None:
    stopping, bests, _ = told([2.0, 1.995, 1.995, 2.5], patience=9, min_delta=0.01)

    assert bests == [True, True, False, False]
    assert (stopping.best_loss, stopping.best_step) == (1.995, 2)


def test_a_loss_that_is_not_finite_is_no_improvement_and_never_best() -> None:
    """BEHAVIOUR 71: NaN."""
    stopping, bests, ended = told([math.nan, math.inf, math.nan], patience=3)

    assert ended == 3
    assert bests == [False, False, False]
    assert stopping.best_step is None


def test_disabled_it_never_stops_but_still_knows_the_best() -> None:
    """BEHAVIOUR 71: enabled false."""
    stopping, _, ended = told([1.0, 2.0, 3.0, 4.0], enabled=False, patience=1)

    assert ended is None
    assert stopping.best_step == 1
