"""A state machine over the whole cache: whatever is done in whatever order, the rules of the budget and of lives hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from graphcache import (
    TRANSITIONS,
    CacheSettings,
    Event,
    EventType,
    FakeBackend,
    FakeClock,
    FakeProgram,
    Graph,
    GraphCache,
    GraphState,
    GraphStateError,
    Priority,
    UnknownGraphError,
)
from graphcache.backends.fake import FakeCaptured

KEYS = [f"k{index}" for index in range(8)]
MAX_REMEMBERED = 4
MAX_PENDING = 3

keys = st.sampled_from(KEYS)


class CountingBackend(FakeBackend):
    """Keeps every capture it ever made."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock, record_seconds=0.01)
        self.made: list[FakeCaptured] = []

    def capture(self, name: str, work: object) -> FakeCaptured:
        captured = super().capture(name, work)  # type: ignore[arg-type]  # the parent's parameter is narrower
        self.made.append(captured)
        return captured


class CacheMachine(RuleBasedStateMachine):
    """Drives a cache without a thread, and checks it after every step."""

    acquired = Bundle("acquired")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.backend = CountingBackend(self.clock)
        self.program = FakeProgram(self.clock)
        self.cache: GraphCache[str] | None = None
        self.held: list[Graph[str]] = []
        self.states: dict[str, GraphState] = {}
        self.pinned_names: set[str] = set()
        self.limit_bytes = 0

    @precondition(lambda self: self.cache is None)
    @rule(policy=st.sampled_from(["value", "lru", "lfu"]), limit_bytes=st.integers(0, 500))
    def make(self, policy: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        cache_settings = CacheSettings(
            budget_bytes=limit_bytes,
            policy=policy,
            stall_budget_seconds=0.5,
            max_pending=MAX_PENDING,
            max_remembered=MAX_REMEMBERED,
            max_events=16,
        )
        self.cache = GraphCache(self.program, self.backend, cache_settings, clock=self.clock, thread=False)
        self.cache.add_listener(self.hear)
        self.cache.start()

    def hear(self, event: Event[str]) -> None:
        """Follows every graph's state through the events alone, against the table of transitions."""
        graph = event.graph
        if graph is None:
            return
        before = self.states.get(graph.name, GraphState.EVICTED)
        if event.type in (EventType.PLANNED, EventType.PUBLISHED, EventType.EVICTED, EventType.FAILED):
            # Between PLANNED and what became of it a capture began, which is no event of its own.
            steps = {before} | ({GraphState.CAPTURING} if before is GraphState.QUEUED else set())
            assert any(graph.state in TRANSITIONS[step] for step in steps), (before, event)
        if event.type is EventType.EVICTED:
            assert graph.name not in self.pinned_names, "a pinned graph was evicted"
        if event.type is EventType.PINNED:
            self.pinned_names.add(graph.name)
        if event.type is EventType.UNPINNED:
            self.pinned_names.discard(graph.name)
        if graph.state is not GraphState.CAPTURING:
            self.states[graph.name] = graph.state

    @property
    def live(self) -> GraphCache[str]:
        assert self.cache is not None
        return self.cache

    @precondition(lambda self: self.cache is not None)
    @rule(key=keys, priority=st.sampled_from(Priority))
    def request(self, key: str, priority: Priority) -> None:
        self.live.request(key, priority)

    @precondition(lambda self: self.cache is not None)
    @rule(key=keys, seconds=st.floats(0.0, 1.0))
    def miss(self, key: str, seconds: float) -> None:
        self.live.record_miss(key, seconds)

    @precondition(lambda self: self.cache is not None)
    @rule(key=keys, seconds=st.floats(0.0, 1.0))
    def hit(self, key: str, seconds: float) -> None:
        graph = self.live.lookup(key)
        if graph is not None:
            self.live.record_hit(graph, seconds)

    @precondition(lambda self: self.cache is not None)
    @rule(target=acquired, key=keys)
    def acquire(self, key: str) -> Graph[str] | None:
        graph = self.live.acquire(key)
        if graph is not None:
            self.held.append(graph)
        return graph

    @precondition(lambda self: self.cache is not None)
    @rule(graph=acquired)
    def report(self, graph: Graph[str] | None) -> None:
        if graph is not None:
            was_published = self.live.lookup(graph.key) is graph
            was_withdrawn = self.live.report_failure(graph, "it was wrong")
            assert was_published or not was_withdrawn
            assert self.live.lookup(graph.key) is not graph

    @rule(graph=consumes(acquired))
    def release(self, graph: Graph[str] | None) -> None:
        if graph is not None:
            graph.replay()
            self.held.remove(graph)
            graph.release()

    @precondition(lambda self: self.cache is not None)
    @rule()
    def run(self) -> None:
        self.live.run_pending()

    @rule(seconds=st.floats(0.0, 5.0))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.cache is not None)
    @rule(key=keys, seconds=st.floats(0.1, 20.0))
    def pin(self, key: str, seconds: float) -> None:
        try:
            self.live.pin(key, seconds)
        except (UnknownGraphError, GraphStateError):
            assert self.live.lookup(key) is None

    @precondition(lambda self: self.cache is not None)
    @rule(key=keys)
    def unpin(self, key: str) -> None:
        try:
            self.live.unpin(key)
        except UnknownGraphError:
            assert self.live.lookup(key) is None

    @precondition(lambda self: self.cache is not None)
    @rule(key=keys)
    def evict(self, key: str) -> None:
        try:
            self.live.evict(key)
        except (UnknownGraphError, GraphStateError):
            assert self.live.lookup(key) is None or key in self.pinned_names

    @precondition(lambda self: self.cache is not None)
    @rule(limit_bytes=st.integers(0, 500))
    def change_budget(self, limit_bytes: int) -> None:
        ready = {info.name for info in self.live.list([GraphState.READY])}
        evicted = self.live.update_budget(limit_bytes=limit_bytes)
        self.limit_bytes = limit_bytes
        assert {info.name for info in self.live.list([GraphState.READY])} == ready - set(evicted)

    @rule(key=keys, size_bytes=st.integers(0, 300))
    def change_size(self, key: str, size_bytes: int) -> None:
        self.backend.sizes[key] = size_bytes

    @rule(key=keys, what=st.sampled_from(["works", "fails", "differs"]))
    def change_outcome(self, key: str, what: str) -> None:
        self.backend.failures.pop(key, None)
        self.program.mismatches.discard(key)
        if what == "fails":
            self.backend.failures[key] = "told to fail"
        elif what == "differs":
            self.program.mismatches.add(key)

    @precondition(lambda self: self.cache is not None)
    @rule()
    def hand_over(self) -> None:
        """A profile may be imported at any time."""
        self.live.import_profile(self.live.export_profile())

    @invariant()
    def budget_is_kept(self) -> None:
        """Unpinned graphs never hold more than the pinned leave of the budget; the ledger is the sum of the ready."""
        if self.cache is None:
            return
        ready = self.cache.list([GraphState.READY])
        pinned_bytes = sum(info.size_bytes for info in ready if info.pin_expire_time is not None)
        used_bytes = sum(info.size_bytes for info in ready)
        budget = self.cache.budget()
        assert (budget.used_bytes, budget.pinned_bytes, budget.num_graphs) == (used_bytes, pinned_bytes, len(ready))
        assert budget.limit_bytes == self.limit_bytes
        assert used_bytes <= self.limit_bytes or used_bytes == pinned_bytes
        if self.limit_bytes == 0:
            assert all(info.pin_expire_time is not None for info in ready)
        assert self.cache.stats().used_bytes == used_bytes

    @invariant()
    def published_is_ready(self) -> None:
        """Exactly the ready graphs are found, every one has its segment, and its bytes are shown."""
        if self.cache is None:
            return
        infos = self.cache.list()
        for info in infos:
            graph = self.cache.lookup(info.key)
            assert (graph is not None) == (info.state is GraphState.READY)
            assert (info.segment is not None) == (info.state is GraphState.READY)
            assert (info.retry_time is not None) == (info.state is GraphState.FAILED)
            if graph is not None:
                assert graph.size_bytes == info.size_bytes
            if info.pin_expire_time is not None:
                assert info.state is GraphState.READY
        known = {info.key for info in infos}
        assert all(self.cache.lookup(key) is None for key in KEYS if key not in known)

    @invariant()
    def every_capture_is_accounted_for(self) -> None:
        """A capture is destroyed at most once, and lives exactly while it is ready or on its way out."""
        assert all(captured.num_destroys <= 1 for captured in self.backend.made)
        if self.cache is not None:
            budget = self.cache.budget()
            live_bytes = sum(captured.size_bytes for captured in self.backend.live)
            assert live_bytes == budget.used_bytes + budget.retiring_bytes

    @invariant()
    def held_graphs_replay(self) -> None:
        """What is acquired can be replayed, evicted or not."""
        for graph in self.held:
            graph.replay()

    @invariant()
    def memory_is_bounded(self) -> None:
        """Neither the queue nor what is remembered grows past its bound, and event numbers have no gaps."""
        if self.cache is None:
            return
        states = [info.state for info in self.cache.list()]
        remembered = (GraphState.EVICTED, GraphState.FAILED, GraphState.QUARANTINED)
        assert sum(state in remembered for state in states) <= MAX_REMEMBERED
        assert self.cache.stats().num_pending <= MAX_PENDING
        numbers = [event.sequence for event in self.cache.events()]
        assert numbers == list(range(self.cache.last_sequence - len(numbers) + 1, self.cache.last_sequence + 1))

    def teardown(self) -> None:
        """After everything is released and the cache is closed, every capture ever made was destroyed exactly once."""
        if self.cache is None:
            return
        for graph in self.held:
            graph.release()
        # Closing unpins before it evicts, so the pins seen so far end with it.
        self.cache.close()
        assert self.backend.live == []
        assert all(captured.num_destroys == 1 for captured in self.backend.made)
        assert all(self.cache.lookup(key) is None for key in KEYS)
        assert self.backend.num_closes == 1


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.__doc__ = "The rules hold in every order of events."
