"""Tests of core.py: wishes, the queue's bounds, estimates, profiles; through the cache, without a capture thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphcache import (
    CacheSettings,
    Event,
    EventType,
    FakeBackend,
    FakeClock,
    FakeProgram,
    GraphCache,
    GraphState,
    Priority,
)

MakeCache = Callable[..., GraphCache[str]]


def capture(cache: GraphCache[str], *keys: str) -> None:
    for key in keys:
        cache.request(key)
        cache.run_pending()
        assert cache.lookup(key) is not None


def types(events: list[Event[str]]) -> list[EventType]:
    return [event.type for event in events]


def test_wishes_coalesce(cache: GraphCache[str], backend: FakeBackend) -> None:
    """A key wished for many times is planned and captured once, and a ready one not again."""
    for _ in range(3):
        cache.request("a")
        cache.record_miss("a", 0.1)
    cache.run_pending()
    assert cache.request("a", Priority.OPERATOR).state is GraphState.READY
    cache.run_pending()
    assert backend.num_captures["a"] == 1
    assert types(cache.events()).count(EventType.PLANNED) == 1


def test_priorities_decide_the_order(cache: GraphCache[str]) -> None:
    """Operators' wishes are captured before misses, those before a profile's; a repeated wish raises its key."""
    cache.request("profile", Priority.PROFILE)
    cache.request("miss")
    cache.request("raised")
    cache.request("operator", Priority.OPERATOR)
    cache.request("raised", Priority.WAITED)
    cache.run_pending()
    published = [event.graph.name for event in cache.events() if event.type is EventType.PUBLISHED and event.graph]
    assert published == ["operator", "raised", "miss", "profile"]


def test_a_full_queue_drops_the_least_wanted(make_cache: MakeCache) -> None:
    """A full queue refuses an equal wish, and drops a lesser one for a greater; who lost can be wished for again."""
    cache = make_cache(max_pending=2)
    cache.request("a")
    cache.request("b")
    assert cache.request("c").state is GraphState.EVICTED
    assert cache.request("d", Priority.OPERATOR).state is GraphState.QUEUED
    assert cache.get("b").state is GraphState.EVICTED
    assert cache.events()[-1].detail == "pushed out of the queue"
    assert cache.stats().num_pending == 2
    cache.run_pending()
    capture(cache, "b", "c")


def test_a_newcomer_is_not_forgotten_for_what_it_pushes_out(make_cache: MakeCache) -> None:
    """With memory and queue full, a wish that takes another's place is known, queued, and captured."""
    cache = make_cache(max_pending=2, max_remembered=1)
    for index in range(20):
        cache.request(f"filler {index}")
        cache.request(f"wish {index}", Priority(index % 3))
        assert cache.stats().num_pending <= 2
    cache.request("last", Priority.OPERATOR)
    cache.run_pending()
    assert cache.get("last").state is GraphState.READY


def test_a_step_served_by_a_larger_graph_wishes_for_its_own(cache: GraphCache[str]) -> None:
    """A miss without a time queues the capture and counts as a miss, with nothing known of eager steps."""
    cache.record_miss("a")
    assert cache.run_pending() == 1
    info = cache.get("a")
    assert (info.state, info.num_misses, info.eager_seconds) == (GraphState.READY, 1, None)


def test_misses_of_what_is_to_be_captured_pay_for_it(
    make_cache: MakeCache, backend: FakeBackend, clock: FakeClock
) -> None:
    """While somebody is served a debt of captures is paid by misses whose graph is queued; one that failed pays nothing."""
    cache = make_cache(stall_budget_seconds=0.001)
    backend.failures["bad"] = "broken"
    cache.request("bad")
    assert cache.run_pending() == 1
    cache.step_launching()
    cache.step_launched()
    for index in range(3):  # ten milliseconds each, on the fake clock
        cache.request(f"k{index}")
    assert cache.run_pending() == 1
    clock.advance(0.01)
    cache.record_miss("bad", 1.0)
    assert cache.run_pending() == 0
    cache.record_miss("k2", 0.1)
    assert cache.run_pending() == 1


def test_misses_that_pour_in_are_bounded(cache: GraphCache[str]) -> None:
    """Misses that nobody takes in are kept up to a bound, so that a stuck capture thread leaks nothing."""
    for index in range(10_000):
        cache.record_miss(f"k{index % 10}", 0.1)
    assert cache.stats().num_misses == 4096


def test_estimates(cache: GraphCache[str], backend: FakeBackend, program: FakeProgram) -> None:
    """An estimate is 0 when ready, grows with the queue and the back-off, and is always finite."""
    backend.failures["bad"] = "broken"
    program.mismatches.add("wrong")
    for key in ("ready", "bad", "wrong"):
        cache.request(key)
    cache.run_pending()
    assert cache.estimate_seconds("ready") == 0.0
    alone = cache.estimate_seconds("new")
    assert 0 < alone < 0.1
    cache.request("ahead")
    assert cache.estimate_seconds("new") == pytest.approx(2 * alone)
    assert cache.estimate_seconds("ahead") == pytest.approx(alone)
    assert 1.0 < cache.estimate_seconds("bad") < 1.2
    assert cache.estimate_seconds("wrong") == 3600.0
    cache.pause()
    assert cache.estimate_seconds("new") == 3600.0


def test_profile_goes_from_one_life_to_the_next(cache: GraphCache[str], clock: FakeClock) -> None:
    """What was hot is exported most valuable first, and imported into another cache is captured in that order."""
    for key, num_hits in (("warm", 2), ("hot", 9), ("unused", 0)):
        if num_hits:
            cache.record_miss(key, 0.02)
        cache.request(key)
        cache.run_pending()
        graph = cache.lookup(key)
        assert graph is not None
        for _ in range(num_hits):
            cache.record_hit(graph, 0.01)
    profile = cache.export_profile()
    assert [(entry.key, entry.num_hits, entry.num_misses) for entry in profile.entries] == [
        ("hot", 9, 1),
        ("warm", 2, 1),
    ]
    assert profile.entries[0].saved_seconds == pytest.approx(0.01)
    assert profile.entries[0].size_bytes == 100
    assert len(cache.export_profile(1).entries) == 1

    settings = CacheSettings(budget_bytes=1000)
    other: GraphCache[str] = GraphCache(FakeProgram(clock), FakeBackend(clock), settings, clock=clock, thread=False)
    other.backend.size_bytes = 100  # type: ignore[attr-defined]  # it is a FakeBackend
    other.request("warm")
    assert other.import_profile(profile) == (1, 1)
    assert (other.events()[-1].type, other.events()[-1].detail) == (EventType.PROFILE_IMPORTED, "1 queued, 1 skipped")
    other.run_pending()
    assert other.lookup("hot") is not None
    assert other.get("hot").num_hits == 0  # another life's hits are not this one's
    other.close()


def test_a_profile_is_imported_as_far_as_the_budget_goes(
    cache: GraphCache[str], make_cache: MakeCache, backend: FakeBackend
) -> None:
    """Entries that would not fit behind those before them are skipped, so that they displace nothing more valuable."""
    keys = [f"k{index}" for index in range(10)]
    for num_hits, key in enumerate(keys):
        cache.record_miss(key, 0.02)
        cache.run_pending()
        graph = cache.lookup(key)
        assert graph is not None
        for _ in range(num_hits):
            cache.record_hit(graph, 0.01)
    other = make_cache(budget_bytes=350)
    assert other.import_profile(cache.export_profile()) == (3, 7)
    other.run_pending()
    assert sorted(info.name for info in other.list([GraphState.READY])) == ["k7", "k8", "k9"]


def test_two_keys_of_one_name_are_refused(clock: FakeClock, backend: FakeBackend, program: FakeProgram) -> None:
    """A key whose name another key has is an error for whoever asks, and a logged one for misses."""
    cache: GraphCache[object] = GraphCache(program, backend, clock=clock, thread=False)
    cache.request(1)
    with pytest.raises(ValueError, match="two keys"):
        cache.request("1")
    cache.record_miss("1", 0.1)
    cache.record_miss(2, 0.1)
    assert cache.run_pending() == 2
    assert cache.stats().num_misses == 1
    cache.close()
