"""A graph and its life: the object of the hot path, the states, and what a caller is shown. It does not decide anything."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from graphcache.errors import GraphStateError
from graphcache.usage import Usage

K = TypeVar("K", bound=Hashable)


class GraphState(enum.Enum):
    """Where an entry of the cache stands."""

    QUEUED = "queued"  # asked for; waits for the capture thread
    CAPTURING = "capturing"  # being bound, recorded, instantiated, verified
    READY = "ready"  # published: serves
    EVICTED = "evicted"  # thrown out, or not wanted enough to be queued; its statistics are kept
    FAILED = "failed"  # the capture failed or there is no room; waits before another try
    QUARANTINED = "quarantined"  # it gave wrong results; only an operator's request tries it again


TRANSITIONS: dict[GraphState, frozenset[GraphState]] = {
    GraphState.QUEUED: frozenset(
        {
            GraphState.CAPTURING,
            GraphState.FAILED,  # no room for it
            GraphState.EVICTED,  # pushed out of the queue
        }
    ),
    GraphState.CAPTURING: frozenset({GraphState.READY, GraphState.FAILED, GraphState.QUARANTINED}),
    GraphState.READY: frozenset(
        {
            GraphState.EVICTED,
            GraphState.QUARANTINED,  # whoever replayed it found it wrong
        }
    ),
    GraphState.EVICTED: frozenset({GraphState.QUEUED}),
    GraphState.FAILED: frozenset({GraphState.QUEUED}),
    GraphState.QUARANTINED: frozenset({GraphState.QUEUED}),
}


class Segment(enum.Enum):
    """Part of the cache a ready graph stands in."""

    PROBATION = "probation"  # new: first to go
    PROTECTED = "protected"  # was used again: goes last


class Priority(enum.IntEnum):
    """Whose wish a capture is; larger goes first."""

    PROFILE = 0  # it was hot in an earlier life
    MISS = 1  # a step ran eagerly for want of it
    WAITED = 2  # a caller waits for it
    OPERATOR = 3  # someone asked for it by name: tried even when it backs off or is quarantined


@dataclass(frozen=True, slots=True)
class CaptureTimings:
    """What the phases of a capture took. `queue_seconds`: from the wish to the start."""

    queue_seconds: float
    record_seconds: float
    instantiate_seconds: float
    verify_seconds: float


@dataclass(frozen=True, slots=True)
class GraphInfo(Generic[K]):
    """One entry as it was at one moment. Times are seconds since the epoch, None where there is none.

    `size_bytes` is 0 unless ready. `num_failures`: attempts that failed since the last success, `failure` why the last
    one did. `eager_seconds` and `graph_seconds` are medians of the last few steps.
    """

    key: K
    name: str
    state: GraphState
    size_bytes: int
    num_hits: int
    num_misses: int
    num_failures: int
    failure: str
    retry_time: float | None
    create_time: float
    publish_time: float | None
    last_hit_time: float | None
    capture: CaptureTimings | None
    eager_seconds: float | None
    graph_seconds: float | None
    segment: Segment | None
    pin_expire_time: float | None


def _refuse_replay() -> None:
    raise GraphStateError("a destroyed graph was replayed: hold it between acquire() and release()")


class Graph(Generic[K]):
    """A published graph: what a hit replays. Made by the cache only.

    `replay()` is valid between an `acquire()` that returned True and its `release()`; the release comes when the
    replay's work is over, not when it is launched.
    """

    __slots__ = ("_is_retired", "_uses", "_wake", "key", "name", "publish_monotonic", "replay", "size_bytes", "usage")

    def __init__(
        self,
        key: K,
        name: str,
        *,
        replay: Callable[[], None],
        size_bytes: int,
        publish_monotonic: float,
        usage: Usage,
        wake: Callable[[], None],
    ) -> None:
        self.key = key
        self.name = name
        self.replay = replay
        self.size_bytes = size_bytes
        self.publish_monotonic = publish_monotonic
        self.usage = usage
        self._wake = wake
        self._is_retired = False
        # One element for each acquisition. A list, because its append and pop are atomic where an integer's += is not.
        self._uses: list[None] = []

    def __repr__(self) -> str:
        state = "retired" if self._is_retired else "published"
        return f"Graph({self.name}, {state}, {len(self._uses)} in use)"

    def acquire(self) -> bool:
        """Keeps the graph from being destroyed until `release()`. False: it was just evicted and must not be replayed."""
        # First the use, then the look: whoever retires the graph does it in the other order, so one of us sees the other.
        self._uses.append(None)
        if self._is_retired:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Ends one acquisition. Raises IndexError when there is none."""
        self._uses.pop()
        if self._is_retired:
            self._wake()  # the capture thread may be waiting to destroy it

    @property
    def is_in_use(self) -> bool:
        return bool(self._uses)

    def retire(self) -> None:
        """No acquisition succeeds from now on. Called by the cache after it unpublished the graph."""
        self._is_retired = True

    def disarm(self) -> None:
        """From now on a replay raises GraphStateError. Called by the cache right before it destroys the capture."""
        self.replay = _refuse_replay
