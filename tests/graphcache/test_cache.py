"""Tests of cache.py: the public behaviour, without a capture thread and with it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from graphcache import (
    BudgetInfo,
    Event,
    EventsGoneError,
    EventType,
    FakeBackend,
    FakeClock,
    FakeProgram,
    GraphCache,
    GraphState,
    Priority,
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


def test_a_miss_becomes_a_hit(cache: GraphCache[str], program: FakeProgram, clock: FakeClock) -> None:
    """A missed key is captured in the background, then looked up, replayed, and counted."""
    assert cache.lookup("a") is None
    assert cache.acquire("a") is None
    cache.record_miss("a", 0.5)
    assert cache.get("a").state is GraphState.QUEUED
    clock.advance(1.0)
    assert cache.run_pending() == 1
    graph = cache.acquire("a")
    assert graph is not None
    assert graph is cache.lookup("a")
    num_runs = program.num_runs["a"]
    graph.replay()
    assert program.num_runs["a"] == num_runs + 1
    clock.advance(2.0)
    cache.record_hit(graph, 0.25)
    graph.release()
    info = cache.get("a")
    assert info.state is GraphState.READY
    assert (info.num_hits, info.num_misses, info.size_bytes) == (1, 1, 100)
    assert (info.eager_seconds, info.graph_seconds) == (0.5, 0.25)
    assert info.last_hit_time == pytest.approx(clock.time())
    assert info.publish_time == pytest.approx(clock.time() - 2.0)
    assert info.capture is not None
    assert info.capture.queue_seconds == pytest.approx(1.0)
    assert info.capture.record_seconds == pytest.approx(0.007)
    assert info.capture.instantiate_seconds == pytest.approx(0.003)
    assert graph.publish_monotonic == pytest.approx(clock.monotonic() - 2.0)


def test_the_life_of_a_graph_is_told_in_events(cache: GraphCache[str]) -> None:
    """Planned, captured, verified, published, pinned, unpinned, evicted: in order, with the graph right after."""
    heard: list[Event[str]] = []
    cache.add_listener(heard.append)
    cache.request("a")
    cache.run_pending()
    cache.pin("a", 10.0)
    cache.unpin("a")
    cache.evict("a")
    told = [(event.type, event.graph.state if event.graph else None) for event in heard]
    assert told == [
        (EventType.PLANNED, GraphState.QUEUED),
        (EventType.CAPTURED, GraphState.CAPTURING),
        (EventType.VERIFIED, GraphState.CAPTURING),
        (EventType.PUBLISHED, GraphState.READY),
        (EventType.PINNED, GraphState.READY),
        (EventType.UNPINNED, GraphState.READY),
        (EventType.EVICTED, GraphState.EVICTED),
    ]
    assert cache.events() == heard
    assert cache.last_sequence == 7
    assert cache.events(5) == heard[5:]
    cache.remove_listener(heard.append)
    with pytest.raises(EventsGoneError):
        cache.events(8)


def test_the_backend_is_told_of_steps(cache: GraphCache[str], backend: FakeBackend) -> None:
    """Before a step is put on the device, and after; a step given up in between is over like any other."""
    cache.step_launching()
    assert backend.num_steps == {"before": 1}
    cache.step_launched()
    assert backend.num_steps == {"before": 1, "after": 1}
    cache.step_finished()
    cache.step_launching()
    cache.step_finished()
    assert backend.num_steps == {"before": 2, "after": 1}
    assert not cache._core.pulse._launches


def test_update_budget_changes_what_is_given(cache: GraphCache[str]) -> None:
    """Each part of the budget changes alone; wrong values change nothing; an event tells."""
    cache.update_budget(stall_budget_seconds=0.5)
    assert cache.update_budget(limit_bytes=2000) == []
    assert cache.budget() == BudgetInfo(
        limit_bytes=2000,
        used_bytes=0,
        pinned_bytes=0,
        retiring_bytes=0,
        pool_bytes=0,
        kv_cache_bytes=0,
        num_graphs=0,
        stall_budget_seconds=0.5,
    )
    with pytest.raises(ValueError, match="limit_bytes"):
        cache.update_budget(limit_bytes=-1)
    with pytest.raises(ValueError, match="stall_budget"):
        cache.update_budget(limit_bytes=1, stall_budget_seconds=2.0)
    assert cache.budget().limit_bytes == 2000
    assert [(event.type, event.detail) for event in cache.events()] == [
        (EventType.BUDGET_UPDATED, "1000 bytes, 0.5 s/s"),
        (EventType.BUDGET_UPDATED, "2000 bytes, 0.5 s/s"),
    ]


def test_listing_is_by_hits_and_can_be_filtered(cache: GraphCache[str]) -> None:
    """Most hits first, names break ties; a filter keeps the states it names."""
    capture(cache, *"abc")
    graph = cache.lookup("c")
    assert graph is not None
    cache.record_hit(graph, 0.1)
    cache.request("d")
    assert [info.name for info in cache.list()] == ["c", "a", "b", "d"]
    assert [info.name for info in cache.list([GraphState.QUEUED, GraphState.FAILED])] == ["d"]


def test_stats_add_up(cache: GraphCache[str], backend: FakeBackend) -> None:
    """The statistics count what happened."""
    backend.failures["bad"] = "broken"
    cache.record_miss("a", 0.1)
    cache.record_miss("bad", 0.1)
    cache.run_pending()
    graph = cache.lookup("a")
    assert graph is not None
    cache.record_hit(graph, 0.1)
    cache.record_hit(graph, 0.1)
    cache.request("queued")
    stats = cache.stats()
    assert stats.backend == "fake"
    assert (stats.num_ready, stats.num_pending) == (1, 1)
    assert (stats.num_hits, stats.num_misses) == (2, 2)
    assert (stats.num_captures, stats.num_evictions, stats.num_failures) == (1, 0, 1)
    assert (stats.used_bytes, stats.limit_bytes) == (100, 1000)


def test_the_pool_is_shown_and_stays(cache: GraphCache[str], backend: FakeBackend) -> None:
    """What captures share is told beside what graphs hold, and is still held when the graph that grew it is gone."""
    backend.pool_growths["a"] = 50
    cache.request("a")
    cache.run_pending()
    cache.request("b")
    cache.run_pending()
    assert (cache.budget().used_bytes, cache.budget().pool_bytes, cache.stats().pool_bytes) == (250, 50, 50)
    cache.evict("a")
    cache.run_pending()
    assert (cache.budget().used_bytes, cache.budget().retiring_bytes) == (100, 0)
    assert cache.budget().pool_bytes == cache.stats().pool_bytes == 50
    cache.close()
    assert cache.budget().pool_bytes == 0


def test_a_listener_may_steer_the_cache(cache: GraphCache[str]) -> None:
    """A listener can call the cache back: here it pins what is published."""

    def pin(event: Event[str]) -> None:
        if event.type is EventType.PUBLISHED and event.graph is not None:
            cache.pin(event.graph.name, 100.0)

    cache.add_listener(pin)
    capture(cache, "a")
    assert cache.get("a").pin_expire_time is not None
    assert types(cache.events())[-1] is EventType.PINNED


def test_a_cache_is_started_once(cache: GraphCache[str]) -> None:
    """The second start is an error."""
    with pytest.raises(RuntimeError, match="running"):
        cache.start()


def test_wait_runs_what_is_pending_without_a_thread(cache: GraphCache[str]) -> None:
    """Without a capture thread, waiting does the work; a key that nobody asked for is unknown."""
    cache.request("a")
    assert [info.state for info in cache.wait(["a"], 1.0)] == [GraphState.READY]
    with pytest.raises(UnknownGraphError):
        cache.wait(["nobody"], 1.0)


def test_repr(cache: GraphCache[str]) -> None:
    """repr tells the backend, the life and the bytes."""
    capture(cache, "a")
    assert repr(cache) == "GraphCache(fake, running, Ledger(1 graphs, 100 of 1000 bytes, 0 pinned, 0 retiring))"


def test_thread_captures_by_itself(make_cache: MakeCache, backend: FakeBackend) -> None:
    """With its thread the cache captures without being told, and wait says when; run_pending is refused."""
    cache = make_cache(thread=True)
    cache.record_miss("a", 0.1)
    cache.request("b", Priority.WAITED)
    assert [info.state for info in cache.wait(["a", "b"], 30.0)] == [GraphState.READY, GraphState.READY]
    with pytest.raises(RuntimeError, match="thread"):
        cache.run_pending()


def test_wait_gives_up_after_its_time(make_cache: MakeCache, backend: FakeBackend) -> None:
    """When the time is over, wait says how the keys stand, and a lookup never waited at all."""
    backend.gate = threading.Event()
    cache = make_cache(thread=True)
    cache.request("a")
    assert next(info.state for info in cache.wait(["a"], 0.01)) in (GraphState.QUEUED, GraphState.CAPTURING)
    assert cache.lookup("a") is None
    backend.gate.set()
    assert [info.state for info in cache.wait(["a"], 30.0)] == [GraphState.READY]


def test_a_failing_listener_does_not_kill_the_thread(make_cache: MakeCache) -> None:
    """A listener that raises on the capture thread costs nothing but a log line."""
    cache = make_cache(thread=True)
    threads: set[str] = set()

    def fail(event: Event[str]) -> None:
        threads.add(threading.current_thread().name)
        raise RuntimeError("broken listener")

    cache.add_listener(fail)
    for key in "ab":
        cache.request(key)
        assert [info.state for info in cache.wait([key], 30.0)] == [GraphState.READY]
    cache.close()
    assert "graphcache-capture" in threads


def test_closing_ends_a_pause_and_waits_for_uses(make_cache: MakeCache, backend: FakeBackend) -> None:
    """close ends a paused capture thread, and destroys a graph in use only after its release."""
    cache = make_cache(thread=True)
    cache.request("a")
    cache.wait(["a"], 30.0)
    graph = cache.acquire("a")
    assert graph is not None
    cache.pause()
    unpublished = threading.Event()
    cache.add_listener(lambda event: unpublished.set() if event.type is EventType.EVICTED else None)
    closer = threading.Thread(target=cache.close)
    closer.start()
    assert unpublished.wait(30)
    assert backend.num_destroys["a"] == 0
    graph.replay()
    graph.release()
    closer.join(30)
    assert not closer.is_alive()
    assert backend.num_destroys["a"] == 1


def test_a_reported_graph_serves_no_more(
    cache: GraphCache[str], backend: FakeBackend, program: FakeProgram, clock: FakeClock
) -> None:
    """A graph that failed after it was published is unpublished at once, pinned or not, its key quarantined until an
    operator asks, and the graph destroyed only when its last user lets go."""
    capture(cache, "a", "b")
    cache.pin("a", 60.0)
    graph = cache.acquire("a")
    assert graph is not None
    sequence = cache.last_sequence
    assert cache.report_failure(graph, "logits were not finite")
    assert cache.lookup("a") is None
    info = cache.get("a")
    assert (info.state, info.failure, info.num_failures) == (GraphState.QUARANTINED, "logits were not finite", 1)
    assert info.pin_expire_time is None
    assert types(cache.events(sequence)) == [EventType.UNPINNED, EventType.QUARANTINED]
    budget = cache.budget()
    assert (budget.used_bytes, budget.pinned_bytes, budget.retiring_bytes) == (100, 0, 100)
    cache.record_miss("a", 0.1)
    assert cache.run_pending() == 0
    assert backend.num_destroys["a"] == 0
    assert not cache.report_failure(graph, "again")
    graph.release()
    cache.run_pending()
    assert backend.num_destroys["a"] == 1
    assert cache.budget().retiring_bytes == 0
    assert cache.stats().num_failures == 1
    assert cache.lookup("b") is not None
    cache.request("a", Priority.OPERATOR)
    assert cache.run_pending() == 1
    assert cache.get("a").state is GraphState.READY
    assert not cache.report_failure(graph, "the old one, late")
    assert cache.get("a").state is GraphState.READY
