"""How a cache is set up, and what it counts: `CacheSettings` and `CacheStats`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphcache.policy import POLICIES


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """All there is to set. Raises ValueError for what makes no sense.

    - budget_bytes: what all ready graphs may hold together; 0 keeps none but the pinned.
    - total_bytes: what graphs and KV blocks may hold together; None sets no such limit.
    - policy: "value", "lru" or "lfu".
    - stall_budget_seconds: capture interference allowed for each second of serving, 0 to 1; 0 captures only while
      nothing is served.
    - max_graphs, max_pending, max_remembered, max_events: ready graphs; queued keys; keys that are neither, whose
      statistics are kept; events kept for those who resume.
    - protected_fraction: of the budget, for graphs that were used again.
    - first_backoff_seconds, max_backoff_seconds: before a failed key is tried again; doubles with each failure.
    - demand_half_life_seconds: after which a use counts half in what is expected.
    - statistics_interval_seconds: between STATISTICS events; also how often pins and segments are looked at when idle.
    """

    budget_bytes: int = 1 << 30
    total_bytes: int | None = None
    policy: str = "value"
    stall_budget_seconds: float = 0.05
    max_graphs: int = 4096
    max_pending: int = 256
    max_remembered: int = 1024
    max_events: int = 4096
    protected_fraction: float = 0.8
    first_backoff_seconds: float = 1.0
    max_backoff_seconds: float = 3600.0
    demand_half_life_seconds: float = 60.0
    statistics_interval_seconds: float = 1.0

    def __post_init__(self) -> None:
        check_bytes("budget_bytes", self.budget_bytes)
        if self.total_bytes is not None:
            check_bytes("total_bytes", self.total_bytes)
        if self.policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, not {self.policy!r}")
        check_stall_budget(self.stall_budget_seconds)
        for name in ("max_graphs", "max_pending", "max_remembered", "max_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not 0 <= self.protected_fraction <= 1:
            raise ValueError(f"protected_fraction is from 0 to 1, not {self.protected_fraction}")
        for name in (
            "first_backoff_seconds",
            "max_backoff_seconds",
            "demand_half_life_seconds",
            "statistics_interval_seconds",
        ):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is positive and finite, not {getattr(self, name)}")


def check_bytes(name: str, value: int) -> None:
    """Raises ValueError unless it is a number of bytes."""
    if value < 0:
        raise ValueError(f"{name} is not negative: {value}")


def check_stall_budget(seconds: float) -> None:
    """Raises ValueError unless it is seconds per second."""
    if not 0 <= seconds <= 1:
        raise ValueError(f"stall_budget_seconds is from 0 to 1, not {seconds}")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made. `num_hits` and `num_misses` count steps; `num_captures` those that were published.

    `num_failures` has the `num_quarantines` among them. `stall_seconds`: what captures took while others were served, all of
    which is charged to the stall budget; it bounds from above what those who were served lost. `pool_bytes`: see BudgetInfo.
    """

    backend: str
    num_ready: int
    num_pending: int
    num_hits: int
    num_misses: int
    num_captures: int
    num_evictions: int
    num_failures: int
    num_quarantines: int
    used_bytes: int
    limit_bytes: int
    pool_bytes: int
    stall_seconds: float
    stall_budget_seconds: float
