"""What the scheduler tells of itself: counts since the start, and how full it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class KvCacheStatus:
    """KV blocks; the scratch block is not among them. Free, cached and used add up to num_blocks."""

    block_size: int
    num_blocks: int
    size_bytes: int
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_tokens: int = 0


@dataclass(slots=True)
class SchedulerStatus:
    """Requests and sequences. See the contract's SchedulerStatus for each field."""

    num_slots: int
    max_waiting: int
    kv_cache: KvCacheStatus = field(repr=False)
    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_requests: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_expired: int = 0
    num_failed: int = 0
    num_rejected: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def snapshot(self) -> SchedulerStatus:
        """A copy that later changes do not touch."""
        return replace(self, kv_cache=replace(self.kv_cache))
