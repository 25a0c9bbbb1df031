"""Tests of policy.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import Candidate, LfuPolicy, LruPolicy, Segment, ValuePolicy
from graphcache.policy import EvictionPolicy, choose_victims, make_policy

PLAIN = Candidate(
    name="a",
    segment=Segment.PROBATION,
    size_bytes=100,
    saved_seconds=0.01,
    expected_hits=10.0,
    num_uses=10,
    last_use_monotonic=5.0,
)


def names(victims: list[Candidate] | None) -> list[str]:
    assert victims is not None
    return [victim.name for victim in victims]


@pytest.mark.parametrize(
    "better",
    [{"saved_seconds": 0.02}, {"expected_hits": 11.0}, {"size_bytes": 99}],
    ids=lambda change: next(iter(change)),
)
def test_value_is_time_saved_times_hits_by_bytes(better: dict[str, float]) -> None:
    """More time saved, more expected hits or fewer bytes make a graph worth more."""
    policy = ValuePolicy()
    assert policy.score(replace(PLAIN, **better)) > policy.score(PLAIN)  # type: ignore[arg-type]  # of the field's type
    assert policy.score(PLAIN) == pytest.approx(0.01 * 10.0 / 100)


def test_value_without_savings_ranks_by_use() -> None:
    """Graphs that save nothing, or nobody knows what, rank below those that save, and by their hits among themselves."""
    policy = ValuePolicy()
    unknown = replace(PLAIN, saved_seconds=None)
    slower = replace(PLAIN, saved_seconds=-0.01, expected_hits=20.0)
    assert policy.score(unknown) < policy.score(slower) < policy.score(PLAIN)


def test_lru_and_lfu_rank_by_one_thing() -> None:
    """LRU looks at the last use only, LFU at the number of uses only."""
    assert LruPolicy().score(replace(PLAIN, last_use_monotonic=9.0, num_uses=0)) > LruPolicy().score(PLAIN)
    assert LfuPolicy().score(replace(PLAIN, num_uses=11, last_use_monotonic=0.0)) > LfuPolicy().score(PLAIN)


def test_policies_by_name() -> None:
    """Each policy is found by its name, and an unknown name is refused."""
    for name in ("value", "lru", "lfu"):
        assert make_policy(name).name == name
    with pytest.raises(ValueError, match="fifo"):
        make_policy("fifo")


def test_probation_goes_before_protected() -> None:
    """A protected graph stays while there is one on probation, though it is worth more."""
    rich = replace(PLAIN, name="rich", expected_hits=1000.0)
    poor = replace(PLAIN, name="poor", expected_hits=0.1, segment=Segment.PROTECTED)
    assert names(choose_victims(ValuePolicy(), [poor, rich], excess_bytes=100)) == ["rich"]


def test_plain_policies_know_no_segments() -> None:
    """LRU and LFU rank protected and other graphs alike."""
    old = replace(PLAIN, name="old", last_use_monotonic=1.0, segment=Segment.PROTECTED)
    assert names(choose_victims(LruPolicy(), [PLAIN, old], excess_bytes=1)) == ["old"]


def test_newcomer_must_be_worth_more_than_a_protected_graph() -> None:
    """A protected graph goes only for a newcomer of higher value, and for a smaller budget whatever it is worth."""
    resident = replace(PLAIN, name="resident", segment=Segment.PROTECTED)
    equal, better = replace(PLAIN, name="equal"), replace(PLAIN, name="better", expected_hits=11.0)
    assert choose_victims(ValuePolicy(), [resident], excess_bytes=1, newcomer=equal) is None
    assert names(choose_victims(ValuePolicy(), [resident], excess_bytes=1, newcomer=better)) == ["resident"]
    assert names(choose_victims(ValuePolicy(), [resident], excess_bytes=1)) == ["resident"]


def test_no_more_go_than_must() -> None:
    """Where one larger graph is enough, the smaller ones that rank before it stay."""
    small = replace(PLAIN, name="small", size_bytes=10, expected_hits=0.0)
    large = replace(PLAIN, name="large", size_bytes=100, expected_hits=1.0)
    assert names(choose_victims(ValuePolicy(), [small, large], excess_bytes=50)) == ["large"]


def test_graphs_without_bytes_do_not_go_for_bytes() -> None:
    """A graph of no bytes is spared when bytes are wanted, and goes when the number of graphs is too large."""
    weightless = replace(PLAIN, name="weightless", size_bytes=0, expected_hits=0.0)
    assert names(choose_victims(LfuPolicy(), [weightless, PLAIN], excess_bytes=1)) == ["a"]
    assert names(choose_victims(LruPolicy(), [weightless, PLAIN], excess_bytes=0, num_excess=2)) == ["a", "weightless"]


candidates = st.builds(
    Candidate,
    name=st.text("abcdef", min_size=1, max_size=6),
    segment=st.sampled_from(Segment),
    size_bytes=st.integers(0, 50),
    saved_seconds=st.none() | st.floats(-1, 1),
    expected_hits=st.floats(0, 100),
    num_uses=st.integers(0, 100),
    last_use_monotonic=st.floats(0, 100),
)


@given(
    st.sampled_from([ValuePolicy(), LruPolicy(), LfuPolicy()]),
    st.lists(candidates, unique_by=lambda candidate: candidate.name, max_size=8),
    st.integers(-10, 200),
    st.integers(-2, 4),
)
def test_victims_free_enough_and_not_one_too_many(
    policy: EvictionPolicy, residents: list[Candidate], excess_bytes: int, num_excess: int
) -> None:
    """Victims free what is asked and none could be left out; None only where all together would not do."""
    victims = choose_victims(policy, residents, excess_bytes=excess_bytes, num_excess=num_excess)
    if victims is None:
        assert sum(resident.size_bytes for resident in residents) < excess_bytes or len(residents) < num_excess
        return
    freed_bytes = sum(victim.size_bytes for victim in victims)
    assert freed_bytes >= excess_bytes
    assert len(victims) >= num_excess
    assert len(set(names(victims))) == len(victims)
    for victim in victims:
        assert freed_bytes - victim.size_bytes < excess_bytes or len(victims) - 1 < num_excess
