"""What the capture thread and its callers share, under one lock: entries, queue, governor, events, and misses on the way in."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from graphcache.clock import Clock
from graphcache.entry import Entry
from graphcache.events import EventLog
from graphcache.governor import Governor
from graphcache.graph import GraphState, Priority
from graphcache.pending import PendingQueue
from graphcache.policy import EvictionPolicy
from graphcache.profile import Profile
from graphcache.pulse import Pulse
from graphcache.settings import CacheSettings
from graphcache.store import GraphStore
from graphcache.turns import CaptureTurns

K = TypeVar("K", bound=Hashable)

log = logging.getLogger("graphcache")

MAX_INBOX_MISSES = 4096  # between two looks at the inbox; older ones are lost to the statistics
FIRST_CAPTURE_SECONDS = 0.02  # taken for a capture's length before any was timed
PROFILE_DEMAND = 64.0  # expected hits of a profile's hottest key when it is imported; the others in proportion
NEW_SAMPLE_WEIGHT = 0.25  # of the newest capture in the running mean


class CacheCore(Generic[K]):
    """The shared state. The serving thread touches only `store.published`, `misses` and `pulse`: no lock."""

    def __init__(
        self, settings: CacheSettings, policy: EvictionPolicy, clock: Clock, *, wake: Callable[[], None]
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.wake = wake
        self.changed = threading.Condition()  # its lock is the cache's
        self.events: EventLog[K] = EventLog(clock, settings.max_events)
        self.store: GraphStore[K] = GraphStore(
            settings, policy, clock, self.events, wake=wake, changed=self.changed.notify_all
        )
        self.pending: PendingQueue[K] = PendingQueue(settings.max_pending)
        self.governor = Governor(clock, settings.stall_budget_seconds)
        self.misses: deque[tuple[K, float | None, float]] = deque(maxlen=MAX_INBOX_MISSES)  # key, seconds, when
        self.pulse = Pulse(clock)
        self.turns = CaptureTurns(self.governor, self.pulse, clock)
        self.is_closed = False  # nothing is queued any more
        self.capture_seconds = FIRST_CAPTURE_SECONDS  # running mean of whole captures

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Holds the lock; tells the listeners of what happened once it is let go. Does not nest."""
        try:
            with self.changed:
                yield
        finally:
            self.events.deliver()

    @property
    def is_serving(self) -> bool:
        """Whether captures hold somebody up."""
        return self.pulse.is_serving

    def take_misses(self) -> None:
        """Counts the misses that came in and queues what they ask for."""
        while self.misses:
            key, seconds, at = self.misses.popleft()
            try:
                entry = self.store.entry(key)
            except ValueError:
                log.exception("a miss of %r cannot be counted", key)
                continue
            entry.usage.record_miss(seconds, at)
            entry.demand.update(entry.usage.num_uses, at, self.settings.demand_half_life_seconds)
            self.request(entry, Priority.MISS)
            if seconds is not None and entry.state in (GraphState.QUEUED, GraphState.CAPTURING):
                self.governor.credit_miss(seconds)

    def request(self, entry: Entry[K], priority: Priority) -> bool:
        """Queues a capture unless there is a reason not to; one that is queued is raised. Returns whether it was new."""
        if entry.state is GraphState.QUEUED:
            self.pending.raise_priority(entry.key, priority)
            return False
        if self.is_closed or not self._shall_queue(entry, priority) or not self.pending.has_room(priority):
            return False
        left = self.pending.push(entry.key, priority)
        # First the newcomer's state: what leaves may push something out of what is remembered, which a wish never is.
        self.store.plan(entry)
        if left is not None:
            self.store.unplan(self.store.entries[left], "pushed out of the queue")
        self.wake()
        return True

    def plan_profile(self, profile: Profile[K]) -> int:
        """Queues what a profile names, as far as the budget goes; returns the number of entries queued."""
        store = self.store
        most_uses = max((entry.num_hits + entry.num_misses for entry in profile.entries), default=0) or 1
        free_bytes = store.ledger.graph_limit_bytes - store.ledger.used_bytes
        num_queued = 0
        for hot in profile.entries:
            entry = store.entry(hot.key)
            if entry.state is not GraphState.EVICTED or hot.size_bytes > free_bytes:
                continue
            if self.request(entry, Priority.PROFILE):
                free_bytes -= hot.size_bytes
                num_queued += 1
                entry.profile_saved_seconds = hot.saved_seconds
                entry.size_bytes = entry.size_bytes or hot.size_bytes
                entry.demand.add(PROFILE_DEMAND * (hot.num_hits + hot.num_misses) / most_uses)
        return num_queued

    def estimate_seconds(self, entry: Entry[K] | None, key: K) -> float:
        """Until a capture of `key` would be ready; finite."""
        state = entry.state if entry is not None else GraphState.EVICTED
        if state is GraphState.READY:
            return 0.0
        limit_seconds = self.settings.max_backoff_seconds
        if state is GraphState.QUARANTINED:
            return limit_seconds
        num_ahead = 0 if state is GraphState.CAPTURING else self.pending.num_ahead(key)
        num_under_way = self.store.num_in_state[GraphState.CAPTURING]
        num_own = 0 if state is GraphState.CAPTURING else 1
        work_seconds = (num_ahead + num_under_way + num_own) * self.capture_seconds
        seconds = self.governor.estimate_seconds(work_seconds, is_serving=self.is_serving)
        if entry is not None and state is GraphState.FAILED:
            seconds += max(0.0, entry.retry_monotonic - self.clock.monotonic())
        return min(seconds, limit_seconds)

    def _shall_queue(self, entry: Entry[K], priority: Priority) -> bool:
        if entry.wants_capture(self.clock.monotonic()):
            return True
        return priority is Priority.OPERATOR and entry.state in (GraphState.FAILED, GraphState.QUARANTINED)
