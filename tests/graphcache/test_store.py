"""Tests of store.py: room, segments, pins, fences, memory; through the cache, without a capture thread."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from graphcache import (
    CacheSettings,
    Candidate,
    Event,
    EventType,
    FakeBackend,
    FakeClock,
    FakeProgram,
    GraphCache,
    GraphState,
    GraphStateError,
    LruPolicy,
    Segment,
    UnknownGraphError,
)

MakeCache = Callable[..., GraphCache[str]]


def capture(cache: GraphCache[str], *keys: str) -> None:
    for key in keys:
        cache.request(key)
        cache.run_pending()
        assert cache.lookup(key) is not None


def types(events: list[Event[str]]) -> list[EventType]:
    return [event.type for event in events]


def test_the_budget_is_kept_by_evicting(cache: GraphCache[str], backend: FakeBackend) -> None:
    """The eleventh graph of 100 bytes evicts one of the ten that 1,000 bytes hold, which is destroyed."""
    keys = [f"k{index:02}" for index in range(11)]
    capture(cache, *keys)
    budget = cache.budget()
    assert (budget.used_bytes, budget.num_graphs, budget.retiring_bytes) == (1000, 10, 0)
    assert len(backend.live) == 10
    assert cache.stats().num_evictions == 1
    assert cache.get("k00").state is GraphState.EVICTED
    assert cache.get("k00").size_bytes == 0


def test_a_burst_of_odd_shapes_does_not_flush_the_hot_set(cache: GraphCache[str], clock: FakeClock) -> None:
    """Graphs that were used again stay, while newcomers displace newcomers."""
    hot = [f"hot{index}" for index in range(6)]
    for key in hot:
        cache.record_miss(key, 0.02)
    cache.run_pending()
    for _ in range(5):
        for key in hot:
            graph = cache.lookup(key)
            assert graph is not None
            cache.record_hit(graph, 0.01)
        clock.advance(0.1)
    for index in range(50):
        cache.record_miss(f"odd{index}", 0.02)
        clock.advance(1.0)
        cache.run_pending()
    assert all(cache.lookup(key) is not None for key in hot)
    assert {cache.get(key).segment for key in hot} == {Segment.PROTECTED}
    assert cache.stats().num_evictions == 46


def test_the_protected_part_is_bounded(cache: GraphCache[str]) -> None:
    """At most the protected fraction of the budget is protected; the least valuable go back on probation."""
    keys = [f"k{index}" for index in range(10)]
    capture(cache, *keys)
    for num_hits, key in enumerate(keys, start=1):
        graph = cache.lookup(key)
        assert graph is not None
        for _ in range(num_hits):
            cache.record_hit(graph, 0.01)
    segments = {info.name: info.segment for info in cache.list()}
    assert [key for key in keys if segments[key] is Segment.PROBATION] == ["k0", "k1"]


def test_lru_evicts_by_last_use(make_cache: MakeCache, clock: FakeClock) -> None:
    """Under LRU the graph that was not used for the longest time goes, however often it was used."""
    cache = make_cache(policy="lru", budget_bytes=200)
    capture(cache, "often", "late")
    often, late = cache.lookup("often"), cache.lookup("late")
    assert often is not None
    assert late is not None
    for _ in range(100):
        cache.record_hit(often, 0.01)
    clock.advance(1.0)
    cache.record_hit(late, 0.01)
    clock.advance(1.0)
    capture(cache, "new")
    assert cache.lookup("often") is None
    assert cache.lookup("late") is not None


def test_lfu_evicts_by_number_of_uses(make_cache: MakeCache, clock: FakeClock) -> None:
    """Under LFU the graph that was used least often goes, however lately it was used."""
    cache = make_cache(policy="lfu", budget_bytes=200)
    capture(cache, "often", "late")
    often, late = cache.lookup("often"), cache.lookup("late")
    assert often is not None
    assert late is not None
    cache.record_hit(often, 0.01)
    cache.record_hit(often, 0.01)
    clock.advance(1.0)
    cache.record_hit(late, 0.01)
    capture(cache, "new")
    assert cache.lookup("late") is None
    assert cache.lookup("often") is not None


def test_a_policy_can_be_passed_in(clock: FakeClock) -> None:
    """A policy object given to the cache is used instead of the settings' one."""

    class YoungestFirst(LruPolicy):
        def score(self, candidate: Candidate) -> float:
            return -super().score(candidate)

    cache: GraphCache[str] = GraphCache(
        FakeProgram(clock),
        FakeBackend(clock, size_bytes=100),
        CacheSettings(budget_bytes=200),
        clock=clock,
        thread=False,
        policy=YoungestFirst(),
    )
    for key in ("old", "young", "new"):
        clock.advance(1.0)
        capture(cache, key)
    assert cache.lookup("old") is not None
    assert cache.lookup("young") is None
    cache.close()


def test_more_room_forgives_what_did_not_fit(cache: GraphCache[str], backend: FakeBackend) -> None:
    """After the budget grows, what failed for want of room is tried at the next miss."""
    backend.sizes["large"] = 2000
    cache.request("large")
    cache.run_pending()
    cache.update_budget(limit_bytes=3000)
    cache.record_miss("large", 0.1)
    cache.run_pending()
    assert cache.lookup("large") is not None


def test_no_budget_keeps_none_but_the_pinned(make_cache: MakeCache, backend: FakeBackend) -> None:
    """A limit of 0 evicts all unpinned graphs, even those of no bytes, and lets none in."""
    cache = make_cache()
    backend.sizes["b"] = 0
    capture(cache, "a", "b", "pinned")
    cache.pin("pinned", 100.0)
    assert sorted(cache.update_budget(limit_bytes=0)) == ["a", "b"]
    cache.request("c")
    cache.run_pending()
    assert [info.name for info in cache.list([GraphState.READY])] == ["pinned"]
    assert backend.num_captures["c"] == 0


def test_the_number_of_graphs_is_bounded(make_cache: MakeCache, backend: FakeBackend) -> None:
    """Graphs of no bytes are evicted by number."""
    cache = make_cache(max_graphs=3)
    backend.size_bytes = 0
    capture(cache, *"abcde")
    assert cache.stats().num_ready == 3


def test_a_pinned_graph_stays(cache: GraphCache[str], clock: FakeClock) -> None:
    """Nothing evicts a pinned graph: not pressure, not a smaller budget, not an operator."""
    capture(cache, "pinned")
    info = cache.pin("pinned", 1000.0)
    assert info.pin_expire_time == pytest.approx(clock.time() + 1000.0)
    for index in range(20):
        cache.request(f"k{index}")
        cache.run_pending()
    assert "pinned" not in cache.update_budget(limit_bytes=50)
    assert cache.budget().pinned_bytes == cache.budget().used_bytes == 100
    with pytest.raises(GraphStateError, match="pinned"):
        cache.evict("pinned")
    assert cache.lookup("pinned") is not None


def test_a_lease_ends_and_can_be_renewed(cache: GraphCache[str], clock: FakeClock) -> None:
    """A pin holds for its lease, counted from its last renewal; then the budget applies again."""
    capture(cache, "a")
    cache.pin("a", 10.0)
    clock.advance(8.0)
    cache.pin("a", 10.0)
    cache.update_budget(limit_bytes=50)
    clock.advance(9.0)
    assert cache.get("a").state is GraphState.READY
    clock.advance(2.0)
    info = cache.get("a")
    assert (info.state, info.pin_expire_time) == (GraphState.EVICTED, None)
    assert cache.budget().pinned_bytes == 0
    unpinned = [event for event in cache.events() if event.type is EventType.UNPINNED]
    assert [event.detail for event in unpinned] == ["the lease ran out"]


def test_unpin_lets_the_budget_have_it(cache: GraphCache[str]) -> None:
    """Unpinning over the budget evicts at once; unpinning what is not pinned does nothing."""
    capture(cache, "a")
    cache.unpin("a")
    cache.pin("a", 10.0)
    cache.update_budget(limit_bytes=50)
    cache.unpin("a")
    assert cache.lookup("a") is None
    assert types(cache.events()).count(EventType.UNPINNED) == 1


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_lease_is_positive_and_finite(cache: GraphCache[str], seconds: float) -> None:
    """Any other lease is refused."""
    capture(cache, "a")
    with pytest.raises(ValueError, match="lease"):
        cache.pin("a", seconds)


def test_only_ready_graphs_are_pinned_and_evicted(cache: GraphCache[str]) -> None:
    """Pin and evict want a ready graph, and every name wants to be known."""
    cache.request("queued")
    with pytest.raises(GraphStateError, match="queued"):
        cache.pin("queued", 1.0)
    with pytest.raises(GraphStateError, match="queued"):
        cache.evict("queued")
    for call in (cache.get, cache.evict, cache.unpin):
        with pytest.raises(UnknownGraphError) as unknown:
            call("nobody")
        assert unknown.value.name == "nobody"
    with pytest.raises(UnknownGraphError):
        cache.pin("nobody", 1.0)


def test_kv_blocks_share_the_ledger(make_cache: MakeCache) -> None:
    """With a total for both, growing KV blocks evict graphs, and the budget shows them."""
    cache = make_cache(total_bytes=1500)
    capture(cache, *"abcde")
    assert cache.set_kv_bytes(1000) == []
    assert len(cache.set_kv_bytes(1200)) == 2
    budget = cache.budget()
    assert (budget.kv_cache_bytes, budget.used_bytes, budget.limit_bytes) == (1200, 300, 1000)
    with pytest.raises(ValueError, match="negative"):
        cache.set_kv_bytes(-1)


def test_what_is_remembered_is_bounded(make_cache: MakeCache, backend: FakeBackend, clock: FakeClock) -> None:
    """Of keys that are neither held nor wished for only so many are remembered; the totals forget nothing."""
    cache = make_cache(max_remembered=16, budget_bytes=200)
    backend.failures["bad"] = "broken"
    cache.record_miss("bad", 0.1)
    for index in range(200):
        cache.record_miss(f"k{index}", 0.1)
        clock.advance(1.0)
        cache.run_pending()
        assert len(cache.list([GraphState.EVICTED, GraphState.FAILED, GraphState.QUARANTINED])) <= 16
    assert cache.stats().num_misses == 201
    assert cache.get("bad").state is GraphState.FAILED  # what failed is remembered longest
    with pytest.raises(UnknownGraphError):
        cache.get("k0")


def test_statistics_are_told_at_an_interval_while_they_change(cache: GraphCache[str], clock: FakeClock) -> None:
    """One event a graph and interval, for graphs that were hit since the last."""
    capture(cache, "a", "b")
    graph = cache.lookup("a")
    assert graph is not None
    before = cache.last_sequence
    for _ in range(3):
        cache.record_hit(graph, 0.1)
        cache.run_pending()
    clock.advance(1.0)
    cache.run_pending()
    clock.advance(1.0)
    cache.run_pending()
    told = [(event.type, event.graph.name, event.graph.num_hits) for event in cache.events(before) if event.graph]
    assert told == [(EventType.STATISTICS, "a", 3)]
