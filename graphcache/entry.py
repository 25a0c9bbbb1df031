"""What the cache remembers of one key: its state, its use, its pin, its failures. Guarded by the cache's lock."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from graphcache.clock import Clock
from graphcache.errors import GraphStateError
from graphcache.graph import TRANSITIONS, CaptureTimings, Graph, GraphInfo, GraphState, Segment
from graphcache.interface import Captured
from graphcache.policy import ASSUMED_SAVED_SHARE, Candidate
from graphcache.usage import Demand, Usage

K = TypeVar("K", bound=Hashable)


class Entry(Generic[K]):
    """One key. Starts EVICTED: known, not held. `graph` and `captured` are there while it is READY."""

    def __init__(self, key: K, name: str, clock: Clock) -> None:
        now = clock.monotonic()
        self.key = key
        self.name = name
        self.state = GraphState.EVICTED
        self.segment: Segment | None = None
        self.usage = Usage()
        self.demand = Demand(now)
        self.graph: Graph[K] | None = None
        self.captured: Captured | None = None
        # By the program that verified it: not while it was only told, beside others, to be in order.
        self.is_replayed = True
        self.num_second_looks = 0  # that could not tell, at the graph that is published
        self.num_second_failures = 0  # of those, how many raised
        self.second_look_monotonic = now  # not before
        self.size_bytes = 0  # as last measured, or as a profile says; 0 when unknown
        self.profile_saved_seconds: float | None = None  # as a profile says, until it is measured
        self.num_failures = 0
        self.failure = ""
        self.retry_monotonic = now
        self.queued_monotonic = now
        self.create_time = clock.time()
        self.publish_time: float | None = None
        self.timings: CaptureTimings | None = None
        self.pin_expire_monotonic: float | None = None
        self.num_hits_at_entry = 0  # hits when it entered its segment
        self.num_hits_reported = 0

    def __repr__(self) -> str:
        pinned = ", pinned" if self.is_pinned else ""
        return f"Entry({self.name}, {self.state.value}{pinned})"

    def move(self, state: GraphState) -> None:
        """The only way a state changes. Raises GraphStateError when it is not in TRANSITIONS."""
        if state not in TRANSITIONS[self.state]:
            raise GraphStateError(f"{self.name} cannot go from {self.state.value} to {state.value}")
        self.state = state

    @property
    def is_pinned(self) -> bool:
        """Until the cache ends the pin, which it does at its next look after the lease."""
        return self.pin_expire_monotonic is not None

    @property
    def is_remembered(self) -> bool:
        """Neither held nor wished for: kept for its statistics, as long as there is room for them."""
        return self.state in (GraphState.EVICTED, GraphState.FAILED, GraphState.QUARANTINED)

    def wants_capture(self, now: float) -> bool:
        """Whether a miss is reason enough to queue it."""
        return self.state is GraphState.EVICTED or (self.state is GraphState.FAILED and now >= self.retry_monotonic)

    @property
    def saved_seconds(self) -> float | None:
        """What a replay saves over an eager step: measured, else from a profile, else assumed, else unknown."""
        eager_seconds, graph_seconds = self.usage.eager_seconds, self.usage.graph_seconds
        if eager_seconds is not None and graph_seconds is not None:
            return eager_seconds - graph_seconds
        if self.profile_saved_seconds is not None:
            return self.profile_saved_seconds
        return None if eager_seconds is None else eager_seconds * ASSUMED_SAVED_SHARE

    def candidate(self, now: float, half_life_seconds: float, size_bytes: int | None = None) -> Candidate:
        """As a policy sees it; `size_bytes` where it is about to hold other than what was last measured."""
        return Candidate(
            name=self.name,
            segment=self.segment or Segment.PROBATION,
            size_bytes=self.size_bytes if size_bytes is None else size_bytes,
            saved_seconds=self.saved_seconds,
            expected_hits=self.demand.update(self.usage.num_uses, now, half_life_seconds),
            num_uses=self.usage.num_uses,
            last_use_monotonic=self.last_use_monotonic,
        )

    @property
    def last_use_monotonic(self) -> float:
        """A wish counts as a use: what an operator asked for is not the first to go."""
        return max(self.usage.last_use_monotonic or 0.0, self.queued_monotonic)

    def info(self, clock: Clock) -> GraphInfo[K]:
        """A snapshot."""
        epoch = clock.time() - clock.monotonic()  # when the monotonic clock read 0
        usage = self.usage
        is_ready = self.state is GraphState.READY
        return GraphInfo(
            key=self.key,
            name=self.name,
            state=self.state,
            size_bytes=self.size_bytes if is_ready else 0,
            num_hits=usage.num_hits,
            num_misses=usage.num_misses,
            num_failures=self.num_failures,
            failure=self.failure,
            retry_time=epoch + self.retry_monotonic if self.state is GraphState.FAILED else None,
            create_time=self.create_time,
            publish_time=self.publish_time,
            last_hit_time=None if usage.last_hit_monotonic is None else epoch + usage.last_hit_monotonic,
            capture=self.timings,
            eager_seconds=usage.eager_seconds,
            graph_seconds=usage.graph_seconds,
            segment=self.segment,
            pin_expire_time=None if self.pin_expire_monotonic is None else epoch + self.pin_expire_monotonic,
        )
