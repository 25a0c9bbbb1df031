"""What the daemon tells of itself: status, drain, clients, health, as frozen dataclasses. It knows no protobuf and no gRPC."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime


class DaemonState(enum.StrEnum):
    """Where the daemon stands in its life."""

    UNSPECIFIED = "unspecified"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    """Requests and sequences (a request with n choices is n sequences). Counts since the start, save the first four."""

    num_slots: int
    num_running: int
    num_waiting: int
    max_waiting: int
    num_steps: int
    num_requests: int
    num_finished: int
    num_cancelled: int
    num_expired: int
    num_failed: int
    num_rejected: int
    num_preemptions: int
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class KvCacheStatus:
    """KV blocks. Free, cached and used add up to the total."""

    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    size_bytes: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class GraphCacheStatus:
    """Graphs, and steps that found one or none."""

    backend: str
    num_ready: int
    num_pending: int
    num_hits: int
    num_misses: int
    num_captures: int
    num_evictions: int
    num_failures: int
    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What the daemon does and holds right now. `model` is empty while loading."""

    version: str
    state: DaemonState
    start_time: datetime | None
    model: str
    scheduler: SchedulerStatus
    kv_cache: KvCacheStatus
    graph_cache: GraphCacheStatus


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """How a drain stands: requests still there, and when what is left will be ended."""

    state: DaemonState
    num_requests: int
    deadline: datetime | None


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """Someone who called since the daemon's start, as far as remembered."""

    name: str  # clients/{id}
    peer: str
    user_agent: str
    num_active_requests: int
    num_requests: int
    num_prompt_tokens: int
    num_completion_tokens: int
    first_seen_time: datetime | None
    last_seen_time: datetime | None
    identity: str = ""  # token/NAME or certificate/NAME, when the caller proved who it is


class Health(enum.StrEnum):
    """What grpc.health.v1 says of a service."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"  # told by watch_health only
