"""All entries, what is published of them, and the ledger: every change of state and its event. It starts no capture.

Everything but `published` is guarded by the cache's lock, which the caller holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from graphcache.clock import Clock
from graphcache.entry import Entry
from graphcache.errors import GraphStateError, UnknownGraphError
from graphcache.events import EventLog, EventType
from graphcache.graph import CaptureTimings, Graph, GraphInfo, GraphState, Segment
from graphcache.interface import Captured
from graphcache.ledger import Ledger
from graphcache.policy import Candidate, EvictionPolicy, choose_victims
from graphcache.settings import CacheSettings

K = TypeVar("K", bound=Hashable)

NO_ROOM = "no room: what is kept is worth more, or pinned"
FIRST_PUT_OFF_SECONDS = 0.5  # of a second look that could not tell
FORGET_SHARE = 8  # at its limit, the memory of what is not held loses one part in this many

_FORGET_ORDER = {GraphState.EVICTED: 0, GraphState.FAILED: 1, GraphState.QUARANTINED: 2}


@dataclass(frozen=True, slots=True)
class Retired(Generic[K]):
    """Serves no more; destroyed once nothing uses it."""

    graph: Graph[K]
    captured: Captured
    size_bytes: int


class GraphStore(Generic[K]):
    """Entries by key. `wake` tells the capture thread that there may be something to destroy; `changed` that a state did."""

    def __init__(
        self,
        settings: CacheSettings,
        policy: EvictionPolicy,
        clock: Clock,
        events: EventLog[K],
        *,
        wake: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self.entries: dict[K, Entry[K]] = {}
        self.published: dict[K, Graph[K]] = {}  # read without a lock by the hot path
        self.retired: list[Retired[K]] = []
        self.ledger = Ledger(settings.budget_bytes, settings.total_bytes)
        self.num_in_state: Counter[GraphState] = Counter()
        self.num_captures = 0
        self.num_evictions = 0
        self.num_failures = 0
        self.num_quarantines = 0
        self._num_forgotten_hits = 0
        self._num_forgotten_misses = 0
        self._names: dict[str, Entry[K]] = {}
        self._settings = settings
        self._policy = policy
        self._clock = clock
        self._events = events
        self._wake = wake
        self._changed = changed

    def find(self, name: str) -> Entry[K]:
        """Raises UnknownGraphError."""
        entry = self._names.get(name)
        if entry is None:
            raise UnknownGraphError(name)
        return entry

    def entry(self, key: K) -> Entry[K]:
        """The entry of this key, made if need be. Raises ValueError when another key has the same name."""
        entry = self.entries.get(key)
        if entry is None:
            name = str(key)
            if name in self._names:
                raise ValueError(f"two keys have the name {name!r}")
            if self._num_remembered >= self._settings.max_remembered:
                self._forget()
            entry = self.entries[key] = self._names[name] = Entry(key, name, self._clock)
            self.num_in_state[entry.state] += 1
        return entry

    def info(self, entry: Entry[K]) -> GraphInfo[K]:
        return entry.info(self._clock)

    @property
    def num_hits(self) -> int:
        return self._num_forgotten_hits + sum(entry.usage.num_hits for entry in self.entries.values())

    @property
    def num_misses(self) -> int:
        return self._num_forgotten_misses + sum(entry.usage.num_misses for entry in self.entries.values())

    # The life of an entry.

    def plan(self, entry: Entry[K]) -> None:
        """It was taken into the queue."""
        entry.queued_monotonic = self._clock.monotonic()
        entry.create_time = self._clock.time()
        self._move(entry, GraphState.QUEUED)
        self._tell(EventType.PLANNED, entry)

    def unplan(self, entry: Entry[K], detail: str) -> None:
        """It was put out of the queue."""
        self._move(entry, GraphState.EVICTED)
        self._tell(EventType.EVICTED, entry, detail)

    def begin(self, entry: Entry[K]) -> None:
        """The capture thread works on it."""
        self._move(entry, GraphState.CAPTURING)

    def fail(self, entry: Entry[K], failure: str) -> None:
        """Backs off, twice as long each time."""
        entry.num_failures += 1
        entry.failure = failure
        settings = self._settings
        backoff_seconds = settings.first_backoff_seconds * 2.0 ** min(entry.num_failures - 1, 64)
        entry.retry_monotonic = self._clock.monotonic() + min(backoff_seconds, settings.max_backoff_seconds)
        self.num_failures += 1
        self._move(entry, GraphState.FAILED)
        self._tell(EventType.FAILED, entry, failure)

    def quarantine(self, entry: Entry[K], failure: str) -> None:
        """It is not tried again by itself."""
        entry.num_failures += 1
        entry.failure = failure
        self.num_failures += 1
        self.num_quarantines += 1
        self._move(entry, GraphState.QUARANTINED)
        self._tell(EventType.QUARANTINED, entry, failure)

    def publish(
        self, entry: Entry[K], captured: Captured, timings: CaptureTimings, *, is_replayed: bool = True
    ) -> None:
        """It serves from the assignment below on. There must be room: `victims` evicted.

        `is_replayed`: its verification needs no second look.
        """
        now = self._clock.monotonic()
        graph = Graph(
            entry.key,
            entry.name,
            replay=captured.replay,
            size_bytes=captured.size_bytes,
            publish_monotonic=now,
            usage=entry.usage,
            wake=self._wake,
        )
        entry.graph, entry.captured, entry.timings = graph, captured, timings
        entry.is_replayed = is_replayed
        entry.num_second_looks = entry.num_second_failures = 0
        entry.second_look_monotonic = now
        entry.size_bytes = captured.size_bytes
        entry.num_failures, entry.failure = 0, ""
        entry.publish_time = self._clock.time()
        self._enter(entry, Segment.PROBATION)
        self.ledger.publish(entry.size_bytes)
        self.num_captures += 1
        self._move(entry, GraphState.READY)
        self.published[entry.key] = graph
        self._tell(EventType.PUBLISHED, entry)

    def evict(self, entry: Entry[K], detail: str) -> None:
        """Unpublishes a ready, unpinned graph; `take_idle` has it once nothing uses it."""
        self._unpublish(entry)
        self.num_evictions += 1
        self._move(entry, GraphState.EVICTED)
        self._tell(EventType.EVICTED, entry, detail)
        self._wake()

    def withdraw(self, entry: Entry[K], failure: str) -> None:
        """Unpublishes a ready graph that proved wrong, pinned or not, and quarantines its key."""
        self.unpin(entry, failure)
        self._unpublish(entry)
        self.quarantine(entry, failure)
        self._wake()

    def _unpublish(self, entry: Entry[K]) -> None:
        if entry.graph is None or entry.captured is None:
            raise GraphStateError(f"{entry.name} is {entry.state.value}, not ready")
        del self.published[entry.key]
        entry.graph.retire()
        self.retired.append(Retired(entry.graph, entry.captured, entry.size_bytes))
        self.ledger.retire(entry.size_bytes)
        entry.graph = entry.captured = entry.segment = None

    def pin(self, entry: Entry[K], seconds: float) -> None:
        """Again: renews the lease. Raises GraphStateError when it is not ready."""
        if entry.state is not GraphState.READY:
            raise GraphStateError(f"{entry.name} is {entry.state.value}, not ready")
        if not entry.is_pinned:
            self.ledger.pin(entry.size_bytes)
        entry.pin_expire_monotonic = self._clock.monotonic() + seconds
        self._tell(EventType.PINNED, entry)

    def unpin(self, entry: Entry[K], detail: str = "") -> None:
        """Nothing happens when it is not pinned."""
        if entry.is_pinned:
            entry.pin_expire_monotonic = None
            self.ledger.unpin(entry.size_bytes)
            self._tell(EventType.UNPINNED, entry, detail)

    @property
    def has_unreplayed(self) -> bool:
        """Whether there is a ready graph whose verification did not replay it."""
        return any(not entry.is_replayed for entry in self._ready())

    def unreplayed(self, now: float) -> Entry[K] | None:
        """The first published of those graphs that may be looked at again now. None when there is none."""
        return next(
            (entry for entry in self._ready() if not entry.is_replayed and entry.second_look_monotonic <= now), None
        )

    def put_off(self, entry: Entry[K]) -> None:
        """A second look at its graph could not tell: the next one waits, twice as long each time."""
        settings = self._settings
        delay_seconds = FIRST_PUT_OFF_SECONDS * 2.0 ** min(entry.num_second_looks, 64)
        entry.num_second_looks += 1
        entry.second_look_monotonic = self._clock.monotonic() + min(delay_seconds, settings.max_backoff_seconds)

    def take_idle(self) -> list[Retired[K]]:
        """Retired graphs that nothing uses any more: the fence is behind them. The caller destroys and frees them."""
        idle = [retired for retired in self.retired if not retired.graph.is_in_use]
        if idle:
            self.retired = [retired for retired in self.retired if retired not in idle]
        return idle

    # Room.

    def victims(self, entry: Entry[K], size_bytes: int) -> list[Entry[K]] | None:
        """Who must go for `entry` to hold `size_bytes`; None when it shall not."""
        limit_bytes = self.ledger.graph_limit_bytes
        if limit_bytes == 0 or size_bytes > limit_bytes - self.ledger.pinned_bytes:
            return None
        excess_bytes = self.ledger.used_bytes + size_bytes - limit_bytes
        num_excess = self.ledger.num_graphs + 1 - self._settings.max_graphs
        if excess_bytes <= 0 and num_excess <= 0:
            return []
        now = self._clock.monotonic()
        newcomer = entry.candidate(now, self._settings.demand_half_life_seconds, size_bytes)
        chosen = choose_victims(
            self._policy, self._evictable(now), excess_bytes=excess_bytes, num_excess=num_excess, newcomer=newcomer
        )
        return None if chosen is None else [self._names[victim.name] for victim in chosen]

    def settle(self) -> list[str]:
        """Ends leases that ran out, moves graphs between segments, evicts down to the budget; returns who was evicted."""
        now = self._clock.monotonic()
        for entry in self._ready():
            if entry.pin_expire_monotonic is not None and entry.pin_expire_monotonic <= now:
                self.unpin(entry, "the lease ran out")
        if self._policy.is_segmented:
            self._move_segments(now)
        limit_bytes = self.ledger.graph_limit_bytes
        evicted: list[Entry[K]] = []
        if limit_bytes == 0:
            evicted = [entry for entry in self._ready() if not entry.is_pinned]
        elif self.ledger.is_over_limit:
            residents = self._evictable(now)
            # Pinned graphs alone may hold more than the budget: then all others go, and that must do.
            excess_bytes = min(self.ledger.used_bytes - limit_bytes, sum(resident.size_bytes for resident in residents))
            chosen = choose_victims(self._policy, residents, excess_bytes=excess_bytes)
            evicted = [self._names[victim.name] for victim in chosen or ()]
        for entry in evicted:
            self.evict(entry, "over the budget")
        return [entry.name for entry in evicted]

    def report_statistics(self) -> None:
        """One event for each graph that was hit since the last report; takes the hits into the decayed demand, too."""
        now = self._clock.monotonic()
        for entry in self._ready():
            entry.demand.update(entry.usage.num_uses, now, self._settings.demand_half_life_seconds)
            if entry.usage.num_hits != entry.num_hits_reported:
                entry.num_hits_reported = entry.usage.num_hits
                self._tell(EventType.STATISTICS, entry)

    def forgive_no_room(self) -> None:
        """There is more room: what backs off for want of it may be tried at once."""
        for entry in self.entries.values():
            if entry.state is GraphState.FAILED and entry.failure == NO_ROOM:
                entry.retry_monotonic = self._clock.monotonic()

    def tell_progress(self, type: EventType, entry: Entry[K]) -> None:  # noqa: A002 the event's word
        """An event that changes no state: captured, verified."""
        self._tell(type, entry)

    def _ready(self) -> list[Entry[K]]:
        return [self.entries[key] for key in self.published]

    def _evictable(self, now: float) -> list[Candidate]:
        half_life_seconds = self._settings.demand_half_life_seconds
        return [entry.candidate(now, half_life_seconds) for entry in self._ready() if not entry.is_pinned]

    def _move_segments(self, now: float) -> None:
        """Whatever was used on probation becomes protected; what is too much for the protected part goes back."""
        for entry in self._ready():
            if entry.segment is Segment.PROBATION and entry.usage.num_hits > entry.num_hits_at_entry:
                self._enter(entry, Segment.PROTECTED)
        protected = [entry for entry in self._ready() if entry.segment is Segment.PROTECTED]
        excess_bytes = sum(entry.size_bytes for entry in protected) - int(
            self._settings.protected_fraction * self.ledger.graph_limit_bytes
        )
        if excess_bytes <= 0:
            return
        half_life_seconds = self._settings.demand_half_life_seconds
        protected.sort(key=lambda entry: self._policy.score(entry.candidate(now, half_life_seconds)))
        for entry in protected:
            if excess_bytes <= 0:
                break
            if entry.size_bytes:
                self._enter(entry, Segment.PROBATION)
                excess_bytes -= entry.size_bytes

    def _enter(self, entry: Entry[K], segment: Segment) -> None:
        entry.segment = segment
        entry.num_hits_at_entry = entry.usage.num_hits

    def _move(self, entry: Entry[K], state: GraphState) -> None:
        before = entry.state
        entry.move(state)
        self.num_in_state[before] -= 1
        self.num_in_state[state] += 1
        if self._num_remembered > self._settings.max_remembered:
            self._forget(keep=entry)
        self._changed()

    def _tell(self, type: EventType, entry: Entry[K], detail: str = "") -> None:  # noqa: A002 the event's word
        self._events.append(type, self.info(entry), detail)

    @property
    def _num_remembered(self) -> int:
        return sum(self.num_in_state[state] for state in _FORGET_ORDER)

    def _forget(self, keep: Entry[K] | None = None) -> None:
        """Drops the oldest of what is neither held nor wished for, failures last: they guard against trying again."""
        remembered = [entry for entry in self.entries.values() if entry.is_remembered and entry is not keep]
        remembered.sort(key=lambda entry: (_FORGET_ORDER[entry.state], entry.last_use_monotonic))
        for entry in remembered[: 1 + len(remembered) // FORGET_SHARE]:
            self._num_forgotten_hits += entry.usage.num_hits
            self._num_forgotten_misses += entry.usage.num_misses
            self.num_in_state[entry.state] -= 1
            del self.entries[entry.key]
            del self._names[entry.name]
