"""What the graph cache shows and takes, as frozen dataclasses. It knows no protobuf and no gRPC.

Durations are in seconds, times are aware datetimes in UTC; None means that it has not happened.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime


class SamplerVariant(enum.StrEnum):
    """What sampling a step graph holds."""

    UNSPECIFIED = "unspecified"
    GREEDY = "greedy"
    GUMBEL = "gumbel"
    FILTERED = "filtered"


@dataclass(frozen=True, slots=True)
class GraphKey:
    """All that a step graph depends on: token bucket, row bucket, sampling."""

    tokens: int
    rows: int
    sampler: SamplerVariant


class GraphState(enum.StrEnum):
    """Where a graph stands."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    CAPTURING = "capturing"
    READY = "ready"
    EVICTED = "evicted"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class CacheSegment(enum.StrEnum):
    """Part of the cache a graph stands in."""

    UNSPECIFIED = "unspecified"
    PROBATION = "probation"
    PROTECTED = "protected"


@dataclass(frozen=True, slots=True)
class CaptureTimings:
    """What the phases of a capture took."""

    queue_seconds: float
    record_seconds: float
    instantiate_seconds: float
    verify_seconds: float


@dataclass(frozen=True, slots=True)
class Graph:
    """One entry of the cache: a graph, or the wish for one."""

    name: str  # graphs/{id}
    key: GraphKey
    state: GraphState
    size_bytes: int
    num_hits: int
    num_misses: int
    num_failures: int
    failure: str
    retry_time: datetime | None
    create_time: datetime | None
    publish_time: datetime | None
    last_hit_time: datetime | None
    capture: CaptureTimings | None
    eager_step_seconds: float | None
    graph_step_seconds: float | None
    segment: CacheSegment
    pin_expire_time: datetime | None


@dataclass(frozen=True, slots=True)
class Budget:
    """How many bytes graphs may hold, and do."""

    limit_bytes: int
    used_bytes: int
    pinned_bytes: int
    kv_cache_bytes: int
    num_graphs: int
    stall_budget_seconds: float  # capture interference allowed, per second of serving


@dataclass(frozen=True, slots=True)
class BudgetUpdate:
    """The budget as it is now, and the names of the graphs that had to go."""

    budget: Budget
    evicted_graphs: tuple[str, ...]


class GraphEventType(enum.StrEnum):
    """What can happen to a graph."""

    UNSPECIFIED = "unspecified"
    PLANNED = "planned"
    CAPTURED = "captured"
    VERIFIED = "verified"
    PUBLISHED = "published"
    EVICTED = "evicted"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    BUDGET_UPDATED = "budget_updated"
    PROFILE_IMPORTED = "profile_imported"
    STATISTICS = "statistics"


@dataclass(frozen=True, slots=True)
class GraphEvent:
    """Something that happened. `sequence` grows by one with each event of the daemon's life."""

    sequence: int
    event_time: datetime | None
    type: GraphEventType
    graph: Graph | None  # as it was right after
    detail: str


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """How hot one shape was."""

    key: GraphKey
    num_hits: int
    num_misses: int
    saved_per_step_seconds: float  # may be negative
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GraphProfile:
    """Which shapes were hot, most valuable first: enough for another daemon of the same model to capture them first."""

    model: str
    create_time: datetime | None
    entries: tuple[ProfileEntry, ...]


@dataclass(frozen=True, slots=True)
class ProfileImport:
    """What came of an import: captures queued, and entries already there or without a bucket."""

    num_queued: int
    num_skipped: int
