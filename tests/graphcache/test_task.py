"""Tests of task.py: what a step of the capture thread does; through the cache, without that thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from graphcache import (
    CacheClosedError,
    CaptureError,
    DeviceLostError,
    EagerBackend,
    Event,
    EventType,
    FakeBackend,
    FakeClock,
    FakeProgram,
    GraphCache,
    GraphState,
    GraphStateError,
    Priority,
    Profile,
)
from graphcache.capture import MISMATCH
from graphcache.store import FIRST_PUT_OFF_SECONDS, NO_ROOM, GraphStore
from graphcache.task import IDLE_LOOK_SECONDS, MAX_SECOND_FAILURES
from tests.graphcache.turns import GivenTurns

MakeCache = Callable[..., GraphCache[str]]


def capture(cache: GraphCache[str], *keys: str) -> None:
    for key in keys:
        cache.request(key)
        cache.run_pending()
        assert cache.lookup(key) is not None


def types(events: list[Event[str]]) -> list[EventType]:
    return [event.type for event in events]


def test_nothing_is_told_as_verified_that_was_not(clock: FakeClock) -> None:
    """With a backend that needs no verification there is no VERIFIED event."""
    cache: GraphCache[str] = GraphCache(FakeProgram(clock), EagerBackend(), clock=clock, thread=False)
    capture(cache, "a")
    assert types(cache.events()) == [EventType.PLANNED, EventType.CAPTURED, EventType.PUBLISHED]
    cache.close()


def test_a_failed_key_backs_off_exponentially(make_cache: MakeCache, backend: FakeBackend, clock: FakeClock) -> None:
    """After each failure the key is left alone twice as long, up to the maximum; a success forgets the failures."""
    cache = make_cache(first_backoff_seconds=1.0, max_backoff_seconds=3.0)
    backend.failures["a"] = "it breaks capture"
    for num_failures, backoff_seconds in enumerate([1.0, 2.0, 3.0, 3.0], start=1):
        cache.record_miss("a", 0.1)
        assert cache.run_pending() == 1
        info = cache.get("a")
        assert (info.state, info.num_failures, info.failure) == (GraphState.FAILED, num_failures, "it breaks capture")
        assert info.retry_time == pytest.approx(clock.time() + backoff_seconds)
        clock.advance(backoff_seconds - 0.5)
        cache.record_miss("a", 0.1)
        assert cache.request("a").state is GraphState.FAILED
        assert cache.run_pending() == 0
        clock.advance(0.5)
    backend.failures.clear()
    capture(cache, "a")
    info = cache.get("a")
    assert (info.num_failures, info.failure, info.retry_time) == (0, "", None)
    assert cache.stats().num_failures == 4


def test_an_operator_is_not_put_off(cache: GraphCache[str], backend: FakeBackend, program: FakeProgram) -> None:
    """An operator's wish is tried at once, though the key backs off or is quarantined."""
    backend.failures["a"] = "broken"
    program.mismatches.add("b")
    cache.request("a")
    cache.request("b")
    cache.run_pending()
    backend.failures.clear()
    program.mismatches.clear()
    for key in "ab":
        assert cache.request(key, Priority.WAITED).state is not GraphState.QUEUED
        assert cache.request(key, Priority.OPERATOR).state is GraphState.QUEUED
    cache.run_pending()
    assert cache.stats().num_ready == 2


def test_wrong_results_are_quarantined(
    cache: GraphCache[str], program: FakeProgram, backend: FakeBackend, clock: FakeClock
) -> None:
    """A graph that gives other results than eager never serves, is destroyed, and is not tried again by misses."""
    program.mismatches.add("a")
    cache.record_miss("a", 0.1)
    cache.run_pending()
    info = cache.get("a")
    assert info.state is GraphState.QUARANTINED
    assert "eager" in info.failure
    assert cache.lookup("a") is None
    assert backend.live == []
    clock.advance(10**6)
    cache.record_miss("a", 0.1)
    assert cache.run_pending() == 0
    assert types(cache.events())[-1] is EventType.QUARANTINED


def test_a_graph_larger_than_the_budget_is_captured_once_and_refused(
    cache: GraphCache[str], backend: FakeBackend, clock: FakeClock
) -> None:
    """What does not fit at all fails and backs off; its size is known from then on, so it is not captured in vain."""
    capture(cache, "small")
    backend.sizes["large"] = 1001
    cache.request("large")
    cache.run_pending()
    assert cache.get("large").state is GraphState.FAILED
    assert "room" in cache.get("large").failure
    assert [captured.name for captured in backend.live] == ["small"]
    clock.advance(10.0)
    cache.request("large")
    assert cache.run_pending() == 1
    assert backend.num_captures["large"] == 1
    assert cache.lookup("small") is not None


def test_a_failed_capture_costs_nobody_a_graph(cache: GraphCache[str], backend: FakeBackend) -> None:
    """With a full budget, a capture that fails evicts nothing."""
    capture(cache, *(f"k{index}" for index in range(10)))
    backend.failures["bad"] = "broken"
    cache.request("bad")
    cache.run_pending()
    assert cache.stats().num_evictions == 0


def test_an_evicted_graph_is_destroyed_after_its_last_use(cache: GraphCache[str], backend: FakeBackend) -> None:
    """Evicting unpublishes at once; the capture lives, and replays, until the last acquisition is released."""
    capture(cache, "a")
    graph = cache.acquire("a")
    assert graph is not None
    assert cache.evict("a").state is GraphState.EVICTED
    assert cache.lookup("a") is None
    assert not graph.acquire()
    cache.run_pending()
    assert backend.num_destroys["a"] == 0
    assert cache.budget().retiring_bytes == 100
    graph.replay()
    graph.release()
    cache.run_pending()
    assert backend.num_destroys["a"] == 1
    assert cache.budget().retiring_bytes == 0
    with pytest.raises(GraphStateError, match="destroyed"):
        graph.replay()


def test_captures_wait_while_evicted_graphs_hold_the_memory(make_cache: MakeCache, backend: FakeBackend) -> None:
    """While graphs on their way out hold what the budget has not, nothing new is captured on top."""
    cache = make_cache(budget_bytes=100)
    capture(cache, "a")
    held = cache.acquire("a")
    assert held is not None
    cache.request("b")
    assert cache.run_pending() == 1  # displaces a, which is still in use
    cache.request("c")
    assert cache.run_pending() == 0
    held.release()
    assert cache.run_pending() == 1
    assert [captured.name for captured in backend.live] == ["c"]


def test_an_evicted_key_can_come_back(cache: GraphCache[str], backend: FakeBackend) -> None:
    """After an eviction a miss captures the key again, its counts going on."""
    cache.record_miss("a", 0.1)
    cache.run_pending()
    cache.evict("a")
    cache.record_miss("a", 0.1)
    cache.run_pending()
    assert cache.lookup("a") is not None
    assert backend.num_captures["a"] == 2
    assert cache.get("a").num_misses == 2


def test_captures_keep_to_the_stall_budget_while_serving(
    make_cache: MakeCache, clock: FakeClock, backend: FakeBackend
) -> None:
    """While steps are recorded, captures take no more than the budget and one burst; once idle, all are made."""
    cache = make_cache(budget_bytes=10**6, stall_budget_seconds=0.05)
    capture(cache, "served")
    served = cache.lookup("served")
    assert served is not None
    for index in range(100):
        cache.request(f"k{index}")
    for _ in range(100):  # one second of serving
        cache.record_hit(served, 0.01)
        clock.advance(0.01)
        cache.run_pending()
    spent_seconds = 0.01 * (backend.num_captures.total() - 1)
    assert 0.1 <= spent_seconds <= 0.05 * (clock.monotonic() + 2.0) + 0.01
    clock.advance(1.0)
    cache.run_pending()
    assert backend.num_captures.total() == 101


def test_leases_end_without_being_asked_about(cache: GraphCache[str], clock: FakeClock) -> None:
    """A step of the capture thread ends leases that ran out and brings the cache down to its budget."""
    capture(cache, "a")
    cache.pin("a", 10.0)
    cache.update_budget(limit_bytes=50)
    before = cache.last_sequence
    clock.advance(11.0)
    cache.run_pending()
    assert [event.type for event in cache.events(before)] == [EventType.UNPINNED, EventType.EVICTED]
    assert cache.lookup("a") is None


def test_a_lease_that_ends_during_a_capture_gives_room(
    make_cache: MakeCache, backend: FakeBackend, clock: FakeClock
) -> None:
    """Room is looked for as things stand when the capture is done, not as they stood before it."""
    cache = make_cache(budget_bytes=200)
    capture(cache, "pinned")
    cache.pin("pinned", 5.0)
    backend.sizes["large"] = 200
    backend.record_seconds = 10.0
    capture(cache, "large")
    assert cache.lookup("pinned") is None


def test_pause_and_resume(cache: GraphCache[str]) -> None:
    """While paused nothing is captured; resumed, it is."""
    cache.pause()
    cache.request("a")
    assert cache.run_pending() == 0
    cache.resume()
    assert cache.run_pending() == 1


def test_close_destroys_everything(cache: GraphCache[str], backend: FakeBackend, program: FakeProgram) -> None:
    """Closing empties the queue, destroys every graph once, closes the backend; then nothing is found or taken in."""
    capture(cache, "a", "pinned")
    cache.pin("pinned", 100.0)
    cache.request("queued")
    cache.close()
    cache.close()
    assert backend.live == []
    assert backend.num_destroys == {"a": 1, "pinned": 1}
    assert backend.num_closes == 1
    assert cache.lookup("a") is None
    assert {info.state for info in cache.list()} == {GraphState.EVICTED}
    with pytest.raises(CacheClosedError):
        cache.request("a")
    with pytest.raises(CacheClosedError):
        cache.import_profile(cache.export_profile())
    cache.record_miss("a", 0.1)
    assert cache.run_pending() == 0
    assert cache.get("a").state is GraphState.EVICTED
    with pytest.raises(RuntimeError):
        cache.start()


def test_a_pause_is_not_charged(make_cache: MakeCache, backend: FakeBackend, clock: FakeClock) -> None:
    """The time a capture stood still for a pause counts neither as interference nor in what captures are said to take."""
    cache = make_cache(stall_budget_seconds=0.1)
    governor = cache._core.governor

    def stand_still() -> None:
        clock.advance(600.0)
        governor.waited_seconds += 600.0

    backend.start(GivenTurns(stand_still))  # its waits take that long from now on
    cache.record_miss("a", 0.1)
    assert cache.run_pending() == 1
    cache.record_miss("b", 0.1)
    assert cache.run_pending() == 1
    assert cache.estimate_seconds("c") < 0.1


def test_a_lost_device_ends_capturing(make_cache: MakeCache, program: FakeProgram) -> None:
    """Once the device is lost nothing is captured or queued any more, and whoever asks is told; lookups go on."""
    cache = make_cache()
    capture(cache, "a")
    assert cache.lost is None
    program.failures["b"] = DeviceLostError("the device is lost: an illegal address")
    cache.request("b", Priority.OPERATOR)
    cache.request("c")
    assert cache.run_pending() == 1
    assert cache.lost is program.failures["b"]
    assert cache.get("b").state is GraphState.FAILED
    assert cache.get("b").failure == "the device is lost: an illegal address"
    assert cache.get("c").state is GraphState.EVICTED
    with pytest.raises(DeviceLostError, match="illegal address"):
        cache.request("c")
    with pytest.raises(DeviceLostError):
        cache.import_profile(Profile(()))
    cache.record_miss("d", 0.1)
    assert cache.run_pending() == 0
    assert cache.get("d").num_misses == 1
    assert cache.lookup("a") is not None
    cache.close()
    assert cache.lookup("a") is None


def test_what_was_told_beside_others_is_asked_again(
    cache: GraphCache[str], program: FakeProgram, backend: FakeBackend, clock: FakeClock
) -> None:
    """A graph that verification could not replay serves, and is replayed once when verification can; then never again."""
    program.is_busy = True
    capture(cache, "a", "b")
    assert backend.num_replays == {}
    program.is_busy = False
    clock.advance(FIRST_PUT_OFF_SECONDS)
    assert cache.run_pending() == 0
    assert backend.num_replays == {"a": 1, "b": 1}
    cache.run_pending()
    assert backend.num_replays == {"a": 1, "b": 1}
    assert types(cache.events())[-2:] == [EventType.VERIFIED, EventType.VERIFIED]


def test_one_that_proves_wrong_later_is_withdrawn(
    cache: GraphCache[str], program: FakeProgram, backend: FakeBackend, clock: FakeClock
) -> None:
    """The second look unpublishes a wrong graph, pinned or not, quarantines its key and destroys it."""
    program.is_busy = True
    program.mismatches.add("a")
    capture(cache, "a", "b")
    cache.pin("a", 60.0)
    program.is_busy = False
    clock.advance(FIRST_PUT_OFF_SECONDS)
    cache.run_pending()
    assert cache.get("a").state is GraphState.QUARANTINED
    assert cache.lookup("a") is None
    assert cache.get("b").state is GraphState.READY
    assert backend.num_destroys == {"a": 1}
    assert cache.budget().pinned_bytes == 0


def test_nobody_is_held_up_by_a_second_look(
    cache: GraphCache[str], program: FakeProgram, backend: FakeBackend, clock: FakeClock
) -> None:
    """While steps are under way or captures are paused there is none; one that could not tell waits before the next."""
    program.is_busy = True
    capture(cache, "a")
    clock.advance(FIRST_PUT_OFF_SECONDS)
    program.is_busy = False
    cache.step_launching()
    cache.run_pending()
    assert not backend.num_replays
    cache.step_finished()
    clock.advance(1.0)
    cache.pause()
    cache.run_pending()
    assert not backend.num_replays
    cache.resume()
    program.is_busy = True
    cache.run_pending()
    program.is_busy = False
    cache.run_pending()
    assert not backend.num_replays
    clock.advance(2 * FIRST_PUT_OFF_SECONDS)
    cache.run_pending()
    assert backend.num_replays == {"a": 1}


def test_a_second_look_may_find_the_device_lost(
    cache: GraphCache[str], program: FakeProgram, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """Then the cache is lost: it says so with an event, refuses wishes, and looks at nothing else; what serves stays."""
    program.is_busy = True
    capture(cache, "a", "b")
    heard: list[tuple[EventType, bool]] = []
    cache.add_listener(lambda event: heard.append((event.type, cache.lost is not None)))
    looked_at: list[object] = []

    def lost(key: object, replay: Callable[[], None]) -> bool:
        looked_at.append(key)
        raise DeviceLostError("gone")

    monkeypatch.setattr(program, "verify", lost)
    for _ in range(3):
        clock.advance(100.0)
        cache.run_pending()
    assert (EventType.FAILED, True) in heard
    assert looked_at == ["a"]
    assert cache.get("a").state is GraphState.READY
    with pytest.raises(DeviceLostError):
        cache.request("c")


def test_one_that_cannot_be_told_keeps_none_from_its_second_look(
    cache: GraphCache[str], program: FakeProgram, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """A look that says nothing is put off, twice as long each time; one that fails again and again ends the graph."""
    program.is_busy = True
    capture(cache, "vague", "broken", "good")
    looks: Counter[object] = Counter()

    def verify(key: object, replay: Callable[[], None]) -> bool | None:
        looks[key] += 1
        if key == "broken":
            raise CaptureError("no gap")
        return None if key == "vague" else True

    monkeypatch.setattr(program, "verify", verify)
    for _ in range(600):
        clock.advance(0.1)
        cache.run_pending()
    assert looks["good"] == 1
    assert looks["broken"] == MAX_SECOND_FAILURES
    assert 5 <= looks["vague"] <= 8  # in a minute
    assert [cache.get(name).state for name in ("vague", "good")] == [GraphState.READY] * 2
    assert cache.get("broken").state is GraphState.QUARANTINED
    assert cache.get("broken").failure == "no gap"


def test_verdicts_of_other_kinds(cache: GraphCache[str], program: FakeProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a truth value counts as it is; what has none is a failed capture, and neither is left half way."""

    class Unsure:
        def __bool__(self) -> bool:
            raise ValueError("more than one element")

    verdicts = {"yes": np.True_, "no": np.False_, "unsure": Unsure()}
    monkeypatch.setattr(program, "verify", lambda key, replay: verdicts[key])
    for key in verdicts:
        cache.request(key)
    cache.run_pending()
    found = {key: cache.get(key).state for key in verdicts}
    assert found == {"yes": GraphState.READY, "no": GraphState.QUARANTINED, "unsure": GraphState.FAILED}


def test_a_second_look_lets_go_of_the_graph_whatever_comes(
    cache: GraphCache[str],
    program: FakeProgram,
    backend: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    clock: FakeClock,
) -> None:
    """Also where verification is interrupted: the graph can be evicted and destroyed afterwards."""
    program.is_busy = True
    capture(cache, "a")

    def interrupted(key: object, replay: Callable[[], None]) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "verify", interrupted)
    clock.advance(1.0)
    with pytest.raises(KeyboardInterrupt):
        cache.run_pending()
    cache.evict("a")
    cache.run_pending()
    assert backend.num_destroys == {"a": 1}


def test_a_second_look_is_charged(cache: GraphCache[str], program: FakeProgram, clock: FakeClock) -> None:
    """If somebody comes to be served meanwhile, its time is taken off the stall budget."""
    program.is_busy = True
    capture(cache, "a")
    clock.advance(10.0)
    governor = cache._core.governor

    def verify(key: object, replay: Callable[[], None]) -> bool:
        cache.step_launching()
        clock.advance(5.0)
        return True

    program.verify = verify  # type: ignore[method-assign]
    cache.run_pending()
    assert governor.delay_seconds(is_serving=True) > 0


def test_the_end_of_serving_is_soon_noticed(make_cache: MakeCache, clock: FakeClock, program: FakeProgram) -> None:
    """While something waits for it, the capture thread looks more often than statistics are due."""
    cache = make_cache(statistics_interval_seconds=60.0, stall_budget_seconds=0.0)
    clock.advance(1.0)
    cache.step_launching()
    assert cache._task.step() == 60.0
    cache.request("a")
    assert cache._task.step() == IDLE_LOOK_SECONDS
    cache.step_finished()
    program.is_busy = True
    clock.advance(1.0)
    assert cache._task.step() == 0.0
    cache.step_launching()
    assert cache._task.step() == IDLE_LOOK_SECONDS


def test_what_cannot_be_published_fails_alone(
    cache: GraphCache[str],
    backend: FakeBackend,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mistake of our own while a graph is published costs that graph: it is destroyed, counted as failed, told in the log
    and captured again later; the next one is published."""
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("a mistake")

        patch.setattr(GraphStore, "publish", fail)
        cache.record_miss("a", 0.1)
        assert cache.run_pending() == 1
    info = cache.get("a")
    assert (info.state, info.num_failures) == (GraphState.FAILED, 1)
    assert (cache.stats().num_failures, cache.stats().num_quarantines) == (1, 0)
    assert backend.live == []
    assert cache.budget().used_bytes == 0
    assert [record.getMessage() for record in caplog.records] == ["publishing a failed"]
    capture(cache, "b")
    clock.advance(3600.0)
    capture(cache, "a")
    assert cache.stats().num_ready == 2


def test_every_failure_is_one_line(
    make_cache: MakeCache, program: FakeProgram, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever keeps a graph from being used is one line that names the graph: a backend that says no, a program that raises,
    wrong results at once or reported later, and no room."""
    cache = make_cache(budget_bytes=backend.size_bytes)
    backend.failures["a"] = "it breaks capture"
    program.failures["b"] = RuntimeError("broken")
    program.mismatches.add("c")
    backend.sizes["d"] = 2 * backend.size_bytes
    for key in "abcd":
        cache.request(key)
        assert cache.run_pending() == 1
    capture(cache, "e")
    graph = cache.lookup("e")
    assert graph is not None
    assert cache.report_failure(graph, "seen to be wrong")
    assert not cache.report_failure(graph, "seen to be wrong")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "capturing a failed: it breaks capture"),
        ("ERROR", "binding b failed"),
        ("ERROR", f"c is quarantined: {MISMATCH}"),
        ("WARNING", f"no capture of d: {NO_ROOM}"),
        ("ERROR", "e is quarantined: seen to be wrong"),
    ]
