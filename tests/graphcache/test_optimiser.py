"""Tests of optimiser.py."""

from __future__ import annotations

import random
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import Ladder, SizeHistogram, choose_ladder, ladder_seconds


def best_by_trying_all(
    counts: dict[int, float], costs: dict[int, float], sizes: dict[int, int], price: float, max_buckets: int
) -> float:
    """The least seconds of all ladders of these candidates that hold the largest counted size."""
    candidates = sorted(costs)
    ladders = chain.from_iterable(combinations(candidates, count) for count in range(1, max_buckets + 1))
    return min(
        ladder_seconds(
            Ladder(ladder), counts, costs.__getitem__, graph_bytes=sizes.__getitem__, byte_price_seconds=price
        )
        for ladder in ladders
        if ladder[-1] >= max(counts)
    )


@given(seed=st.integers(0, 2**32), num_candidates=st.integers(1, 8), max_buckets=st.integers(1, 5))
def test_it_is_as_good_as_trying_all(seed: int, num_candidates: int, max_buckets: int) -> None:
    """For any counts, costs (rising or not), bytes and price, no ladder beats the chosen one, and it has no size too many."""
    chance = random.Random(seed)
    candidates = sorted(chance.sample(range(1, 40), num_candidates))
    sizes = chance.sample(range(1, candidates[-1] + 1), min(candidates[-1], chance.randint(1, 10)))
    counts = {size: chance.uniform(0.01, 10.0) for size in sizes}
    costs = {size: chance.uniform(0.1, 2.0) for size in candidates}
    if chance.random() < 0.5:
        costs = {size: size * 0.1 + 1.0 for size in candidates}
    graph_bytes = {size: chance.randint(1, 100) for size in candidates}
    price = chance.choice([0.0, 0.001, 0.1])
    chosen = choose_ladder(
        counts,
        costs.__getitem__,
        max_buckets=max_buckets,
        graph_bytes=graph_bytes.__getitem__,
        byte_price_seconds=price,
        candidates=candidates,
    )
    assert len(chosen) <= max_buckets
    assert set(chosen) <= set(candidates)
    assert chosen.sizes[-1] >= max(counts)
    found = ladder_seconds(
        chosen, counts, costs.__getitem__, graph_bytes=graph_bytes.__getitem__, byte_price_seconds=price
    )
    assert found == pytest.approx(best_by_trying_all(counts, costs, graph_bytes, price, max_buckets))


def test_the_hot_sizes_have_buckets_of_their_own() -> None:
    """With two buckets, the size that nearly always comes is not padded, and the rare ones share the largest."""
    counts = {3: 1000.0, 17: 1.0, 40: 2.0, 64: 1.0}
    assert choose_ladder(counts, float, max_buckets=2) == Ladder([3, 64])


def test_enough_buckets_pad_nothing() -> None:
    """Where buckets are free and enough, every size is a bucket."""
    counts = {size: 1.0 + size % 3 for size in (1, 4, 9, 25, 31)}
    ladder = choose_ladder(counts, float, max_buckets=9)
    assert ladder == Ladder(counts)
    assert ladder_seconds(ladder, counts, float) == pytest.approx(sum(s * count for s, count in counts.items()))


def test_bytes_that_cost_more_than_padding_are_not_spent() -> None:
    """A price on bytes makes ladders shorter, down to one bucket."""
    counts = dict.fromkeys(range(1, 13), 1.0)
    lengths = [
        len(choose_ladder(counts, float, max_buckets=12, graph_bytes=lambda size: 1000, byte_price_seconds=price))
        for price in (0.0, 0.002, 0.01, 1.0)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (12, 1)
    assert lengths[1] > lengths[2] > 1


def test_padding_goes_to_where_it_is_fast() -> None:
    """Where a larger step is faster, sizes are padded to it, if it is among the candidates."""
    costs = {10: 5.0, 11: 4.0, 12: 6.0}
    assert choose_ladder({10: 1.0}, costs.__getitem__, max_buckets=2, candidates=costs) == Ladder([11])


def test_what_makes_no_sense_is_refused() -> None:
    """No bucket, nothing to choose from, or a size that no candidate or bucket holds is a ValueError."""
    with pytest.raises(ValueError, match="at least one"):
        choose_ladder({1: 1.0}, float, max_buckets=0)
    with pytest.raises(ValueError, match="at least one"):
        choose_ladder({}, float, max_buckets=3)
    with pytest.raises(ValueError, match="size 9"):
        choose_ladder({9: 1.0}, float, max_buckets=3, candidates=[8])
    with pytest.raises(ValueError, match="size 9"):
        ladder_seconds(Ladder([8]), {9: 1.0}, float)


def test_sizes_that_never_come_ask_for_nothing() -> None:
    """A count of zero needs no bucket, and without counts the cheapest candidate alone is left."""
    assert choose_ladder({4: 1.0, 90: 0.0}, float, max_buckets=3) == Ladder([4])
    assert choose_ladder(
        {}, float, max_buckets=3, candidates=[2, 8], graph_bytes=int, byte_price_seconds=1.0
    ) == Ladder([2])


def test_counts_halve_with_every_half_life() -> None:
    """A size counts what came of it, each by its own age, over any span of time."""
    chance = random.Random(5)
    histogram = SizeHistogram(half_life_seconds=2.0)
    assert histogram.counts(1e9) == {}
    came: list[tuple[int, float]] = []
    now = 1e6
    for _ in range(3000):  # for about 750 half-lives: the weights are scaled back on the way
        now += chance.expovariate(2.0)
        came.append((chance.randint(1, 5), now))
        histogram.record(*came[-1])
    now += 1.0
    expected = {size: sum(0.5 ** ((now - at) / 2.0) for other, at in came if other == size) for size in range(1, 6)}
    assert histogram.counts(now) == pytest.approx(expected)


def test_a_histogram_refuses_what_is_no_size_or_half_life() -> None:
    """Sizes start at 1 and half-lives are positive and finite."""
    with pytest.raises(ValueError, match="half_life_seconds"):
        SizeHistogram(0.0)
    with pytest.raises(ValueError, match="not 0"):
        SizeHistogram(1.0).record(0, 0.0)
