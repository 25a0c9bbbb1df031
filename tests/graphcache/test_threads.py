"""Several threads at once: serving, wishing, evicting, changing the budget, while the capture thread works."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from graphcache import (
    CacheSettings,
    CaptureError,
    Event,
    FakeBackend,
    FakeProgram,
    Graph,
    GraphCache,
    GraphState,
    GraphStateError,
    Priority,
    UnknownGraphError,
)
from graphcache.backends.fake import FakeCaptured
from graphcache.worker import CAPTURE_THREAD_NAME

KEYS = [f"k{index}" for index in range(24)]
DEADLINE_SECONDS = 60.0
PACE_SECONDS = 0.0005  # between two acts of one thread, so that none starves the others of the interpreter
MIN_EVICTIONS = 300  # the test runs until so many happened
MIN_REPLAYS = 3000


class CheckingBackend(FakeBackend):
    """Some captures fail; which thread captured and destroyed is noted, and every capture kept."""

    def __init__(self) -> None:
        super().__init__(size_bytes=100)
        self.threads: set[str] = set()
        self.made: list[FakeCaptured] = []
        self.random = random.Random(1)

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        self.threads.add(threading.current_thread().name)
        if self.random.random() < 0.1:
            raise CaptureError("told to fail")
        captured = super().capture(name, work)
        self.made.append(captured)
        return captured

    def on_destroy(self, captured: FakeCaptured) -> None:
        self.threads.add(threading.current_thread().name)
        super().on_destroy(captured)


class Crowd:
    """Threads that run until they are told to stop; the first failure of any is raised at the end."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def add(self, act: Callable[[random.Random], None]) -> None:
        def run(seed: int) -> None:
            chance = random.Random(seed)
            try:
                while not self.is_over.wait(PACE_SECONDS):
                    act(chance)
            except BaseException as error:
                self.failures.append(error)
                self.is_over.set()

        self._threads.append(threading.Thread(target=run, args=(len(self._threads),)))

    def run_until(self, condition: Callable[[], bool]) -> None:
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition() and not self.is_over.is_set() and time.monotonic() < deadline:
            self.is_over.wait(0.01)
        self.is_over.set()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
        if self.failures:
            raise self.failures[0]
        assert condition(), "the crowd ran out of time"


def test_a_crowd_breaks_nothing() -> None:
    """With everything happening at once, no destroyed graph is replayed, and every capture is destroyed exactly once."""
    backend = CheckingBackend()
    settings = CacheSettings(
        budget_bytes=800,
        stall_budget_seconds=1.0,
        first_backoff_seconds=0.001,
        max_backoff_seconds=0.002,
        statistics_interval_seconds=0.005,
    )
    cache: GraphCache[str] = GraphCache(FakeProgram(), backend, settings)
    sequences: list[int] = []
    num_replays = [0, 0]

    def hear(event: Event[str]) -> None:
        sequences.append(event.sequence)
        if event.sequence % 50 == 0:
            raise RuntimeError("a broken listener")

    cache.add_listener(hear)
    cache.start()

    def make_server(place: int) -> Callable[[random.Random], None]:
        running: list[Graph[str]] = []  # launched and not yet read, as an engine that runs ahead has them

        def serve(chance: random.Random) -> None:
            for _ in range(50):
                key = chance.choice(KEYS)
                graph = cache.acquire(key)
                if graph is None:
                    cache.record_miss(key, 0.002)
                else:
                    graph.replay()
                    cache.record_hit(graph, 0.001)
                    running.append(graph)
                    num_replays[place] += 1
                if len(running) > 2:
                    oldest = running.pop(0)
                    oldest.replay()  # still valid, whatever was evicted meanwhile
                    oldest.release()
            while running:
                running.pop().release()

        return serve

    def operate(chance: random.Random) -> None:
        key = chance.choice(KEYS)
        try:
            match chance.randrange(6):
                case 0:
                    cache.request(key, Priority.OPERATOR)
                case 1:
                    cache.pin(key, 0.001)
                case 2:
                    cache.update_budget(limit_bytes=chance.choice([0, 300, 800]))
                case 3:
                    cache.list()
                    cache.stats()
                    cache.events(cache.last_sequence)
                case _:
                    cache.evict(key)
        except (UnknownGraphError, GraphStateError):
            pass  # it was not there, or pinned: that is what the two say

    crowd = Crowd()
    crowd.add(make_server(0))
    crowd.add(make_server(1))
    crowd.add(operate)
    crowd.add(operate)
    try:
        crowd.run_until(lambda: cache.stats().num_evictions >= MIN_EVICTIONS and sum(num_replays) >= MIN_REPLAYS)
        budget = cache.budget()
        ready = cache.list([GraphState.READY])
        assert budget.used_bytes == sum(info.size_bytes for info in ready)
    finally:
        cache.close()
    assert backend.threads == {CAPTURE_THREAD_NAME}
    assert backend.live == []
    assert all(captured.num_destroys == 1 for captured in backend.made)
    assert sequences == list(range(1, cache.last_sequence + 1))


def test_the_serving_thread_never_waits_for_the_lock() -> None:
    """Lookup, acquire, release and both records go through while another thread holds the cache's lock."""
    cache: GraphCache[str] = GraphCache(FakeProgram(), FakeBackend(), thread=False)
    cache.request("a")
    cache.run_pending()
    is_served = threading.Event()

    def serve() -> None:
        graph = cache.acquire("a")
        assert graph is not None
        graph.replay()
        cache.record_hit(graph, 0.001)
        graph.release()
        assert cache.lookup("b") is None
        cache.record_miss("b", 0.001)
        is_served.set()

    thread = threading.Thread(target=serve)
    with cache._core.changed:
        thread.start()
        assert is_served.wait(DEADLINE_SECONDS)
    thread.join(DEADLINE_SECONDS)
    cache.close()


def test_lookups_go_on_while_a_capture_hangs() -> None:
    """A capture that takes its time holds up neither lookups nor any other call."""
    backend = FakeBackend()
    backend.gate = threading.Event()
    cache: GraphCache[str] = GraphCache(FakeProgram(), backend)
    capturing = threading.Event()
    cache.start()
    cache.request("a")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while cache.get("a").state is not GraphState.CAPTURING and time.monotonic() < deadline:
        capturing.wait(0.001)
    assert cache.lookup("a") is None
    assert cache.stats().num_pending == 1
    assert cache.request("b").state is GraphState.QUEUED
    backend.gate.set()
    assert [info.state for info in cache.wait(["a", "b"], DEADLINE_SECONDS)] == [GraphState.READY] * 2
    cache.close()


def test_a_pause_stops_a_capture_between_its_phases() -> None:
    """Paused in the middle, a capture stops at its next checkpoint and goes on when resumed."""

    class PausingProgram(FakeProgram):
        def bind(self, key: object) -> Callable[[], None]:
            work = super().bind(str(key))
            cache.pause()
            bound.set()
            return work

    bound = threading.Event()
    backend = FakeBackend()
    cache: GraphCache[str] = GraphCache(PausingProgram(), backend)
    cache.start()
    cache.request("a")
    assert bound.wait(DEADLINE_SECONDS)
    assert cache.get("a").state is GraphState.CAPTURING
    assert backend.num_captures["a"] == 0
    cache.resume()
    assert cache.wait(["a"], DEADLINE_SECONDS)[0].state is GraphState.READY
    cache.close()


def test_a_graph_still_in_use_at_the_end_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph that is never released is not destroyed under its user; closing says so and ends all the same."""
    monkeypatch.setattr("graphcache.cache.SHUT_SECONDS", 0.01)
    backend = FakeBackend()
    cache: GraphCache[str] = GraphCache(FakeProgram(), backend)
    cache.start()
    cache.request("a")
    cache.wait(["a"], DEADLINE_SECONDS)
    graph = cache.acquire("a")
    assert graph is not None
    cache.close()
    graph.replay()
    assert backend.num_destroys["a"] == 0
    assert backend.num_closes == 0
    assert "still in use" in caplog.text
