from __future__ import annotations

from llamahome.training.engine.choosing import LONG_ROW_TOKENS, Offer, choose, start_virtual


def offers(virtual: int, *tokens: int, admitted: int = 0, kind: str = "learn") -> list[Offer]:
    return [Offer(virtual, admitted, kind, each, each) for each in tokens]


def test_the_job_with_the_fewest_tokens_goes_first_and_always_gets_in() -> None:
    assert choose([offers(500, 10), offers(100, 900)], 200) == [0, 1]


def test_others_follow_while_they_fit_whoever_has_had_the_fewest_by_then() -> None:
    mine = [offers(0, 30, 30, 30), offers(5, 40, 40), offers(9, 60)]

    assert choose(mine, 130) == [1, 1, 1]
    assert choose(mine, 170) == [2, 1, 1]
    assert choose(mine, 1000) == [3, 2, 1]
    assert choose([offers(0, 10, 10, 10), offers(25, 10)], 30) == [3, 0]


def test_equal_jobs_go_in_the_order_of_their_admission() -> None:
    assert choose([offers(7, 10, admitted=2), offers(7, 10, admitted=1)], 10) == [0, 1]


def test_what_learns_and_what_does_not_never_share_a_pass() -> None:
    mine = [offers(0, 10, kind="evaluate"), offers(1, 10), offers(2, 10, kind="evaluate")]

    assert choose(mine, 1000) == [1, 0, 1]


def test_long_rows_go_apart_from_short_ones() -> None:
    mine = [offers(0, LONG_ROW_TOKENS), offers(1, 10), offers(2, LONG_ROW_TOKENS + 5)]

    assert choose(mine, 100_000) == [1, 0, 1]


def test_nothing_is_chosen_where_nothing_is_offered() -> None:
    assert choose([[], []], 100) == [0, 0]


def test_over_time_every_job_gets_the_same_tokens_whatever_the_size_of_its_units() -> None:
    sizes, had = [16, 100, 333], [0, 0, 0]
    for _ in range(3000):
        mine = [offers(had[i], *[size] * 40, admitted=i) for i, size in enumerate(sizes)]
        for index, count in enumerate(choose(mine, 512)):
            had[index] += count * sizes[index]

    assert max(had) - min(had) <= 512, had


def test_a_new_job_starts_where_the_least_served_stands() -> None:
    assert start_virtual([900, 400, 700]) == 400
    assert start_virtual([]) == 0
