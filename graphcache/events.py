"""What happened, in order, kept for a while: events with sequence numbers, and who wants to hear of them."""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from graphcache.clock import Clock
from graphcache.errors import EventsGoneError
from graphcache.graph import GraphInfo

K = TypeVar("K", bound=Hashable)

log = logging.getLogger("graphcache")


class EventType(enum.Enum):
    """What can happen."""

    PLANNED = "planned"  # a capture was queued
    CAPTURED = "captured"  # it was recorded and instantiated
    VERIFIED = "verified"  # it gave the eager result on a probe
    PUBLISHED = "published"  # it serves from now on
    EVICTED = "evicted"  # it was thrown out, or its wish was pushed out of the queue
    FAILED = "failed"  # the capture failed, or there was no room; with no graph: the device is lost
    QUARANTINED = "quarantined"  # it gave another result than eager
    PINNED = "pinned"  # it may not be evicted for a while
    UNPINNED = "unpinned"  # it may be evicted again
    BUDGET_UPDATED = "budget_updated"  # no graph
    PROFILE_IMPORTED = "profile_imported"  # no graph
    STATISTICS = "statistics"  # its hits since the last such event, at a fixed interval


@dataclass(frozen=True, slots=True)
class Event(Generic[K]):
    """Something that happened. `sequence` grows by one, from 1; `time` is seconds since the epoch.

    `graph` is the graph as it was right after, `detail` a few fixed words more.
    """

    sequence: int
    time: float
    type: EventType
    graph: GraphInfo[K] | None
    detail: str


Listener = Callable[[Event[K]], None]


class EventLog(Generic[K]):
    """The last events. `append` is called under the cache's lock, `deliver` after it; the rest from anywhere.

    Listeners hear every event once, in order, on a thread that made events, and hold up nobody's lock: they may call
    the cache. One that raises is logged and goes on being told.
    """

    def __init__(self, clock: Clock, max_events: int) -> None:
        self._clock = clock
        self._events: deque[Event[K]] = deque(maxlen=max_events)
        self._undelivered: deque[Event[K]] = deque()
        self._listeners: tuple[Listener[K], ...] = ()
        self._delivering = threading.Lock()
        self._changing = threading.Lock()
        self._last_sequence = 0

    @property
    def last_sequence(self) -> int:
        """0 before the first event."""
        return self._last_sequence

    def append(self, type: EventType, graph: GraphInfo[K] | None = None, detail: str = "") -> None:  # noqa: A002 the event's word
        self._last_sequence += 1
        event = Event(self._last_sequence, self._clock.time(), type, graph, detail)
        self._events.append(event)
        self._undelivered.append(event)

    def deliver(self) -> None:
        """Tells the listeners what they were not told yet."""
        # Whoever holds `_delivering` tells everything, so that order holds; a listener that makes events comes back here
        # and leaves them to the loop that called it. The outer loop catches what came in as the lock was let go.
        while self._undelivered and self._delivering.acquire(blocking=False):
            try:
                while self._undelivered:
                    event = self._undelivered.popleft()
                    for listener in self._listeners:
                        self._tell(listener, event)
            finally:
                self._delivering.release()

    def add_listener(self, listener: Listener[K]) -> None:
        with self._changing:
            self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: Listener[K]) -> None:
        """Not an error when it is not there. An event under way may still reach it."""
        with self._changing:
            self._listeners = tuple(other for other in self._listeners if other != listener)

    def after(self, sequence: int) -> list[Event[K]]:
        """Events after this one; 0 means all that are kept. Called under the cache's lock. Raises EventsGoneError."""
        events = list(self._events)
        oldest_sequence = events[0].sequence if events else self._last_sequence + 1
        if sequence < 0 or sequence > self._last_sequence or 0 < sequence < oldest_sequence - 1:
            raise EventsGoneError(
                after_sequence=sequence, oldest_sequence=oldest_sequence, last_sequence=self._last_sequence
            )
        return [event for event in events if event.sequence > sequence]

    @staticmethod
    def _tell(listener: Listener[K], event: Event[K]) -> None:
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed at event %d (%s)", event.sequence, event.type.value)
