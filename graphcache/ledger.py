"""The one account of bytes: graphs that serve, graphs on their way out, and what the owner's KV blocks take.

It adds and refuses nonsense; it does not choose what to evict.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BudgetInfo:
    """The budget at one moment. `used_bytes` is of all ready graphs, `pinned_bytes` of the pinned among them.

    `retiring_bytes` is of graphs that serve no more and are destroyed once their last replay is over. `pool_bytes` is all
    of the memory that the backend's captures share, which no graph's end gives back; what a graph grew it by is in its own
    bytes, too.
    `stall_budget_seconds` is the capture interference allowed for each second of serving.
    """

    limit_bytes: int
    used_bytes: int
    pinned_bytes: int
    retiring_bytes: int
    pool_bytes: int
    kv_cache_bytes: int
    num_graphs: int
    stall_budget_seconds: float


class Ledger:
    """Bytes by purpose. `limit_bytes` is for graphs; `total_bytes`, when there is one, for graphs and KV together."""

    def __init__(self, limit_bytes: int, total_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.pinned_bytes = 0
        self.retiring_bytes = 0
        self.kv_cache_bytes = 0
        self.num_graphs = 0

    def __repr__(self) -> str:
        return (
            f"Ledger({self.num_graphs} graphs, {self.used_bytes} of {self.graph_limit_bytes} bytes, "
            f"{self.pinned_bytes} pinned, {self.retiring_bytes} retiring)"
        )

    @property
    def graph_limit_bytes(self) -> int:
        """What ready graphs may hold now: the limit, or less where the KV blocks leave less."""
        if self.total_bytes is None:
            return self.limit_bytes
        return max(0, min(self.limit_bytes, self.total_bytes - self.kv_cache_bytes))

    @property
    def is_over_limit(self) -> bool:
        return self.used_bytes > self.graph_limit_bytes

    def publish(self, size_bytes: int) -> None:
        """A graph serves from now on."""
        self.used_bytes += size_bytes
        self.num_graphs += 1

    def retire(self, size_bytes: int) -> None:
        """A ready, unpinned graph serves no more; its bytes are still held."""
        self.used_bytes -= size_bytes
        self.num_graphs -= 1
        self.retiring_bytes += size_bytes
        self._check()

    def free(self, size_bytes: int) -> None:
        """A retiring graph was destroyed."""
        self.retiring_bytes -= size_bytes
        self._check()

    def pin(self, size_bytes: int) -> None:
        self.pinned_bytes += size_bytes
        self._check()

    def unpin(self, size_bytes: int) -> None:
        self.pinned_bytes -= size_bytes
        self._check()

    def _check(self) -> None:
        assert 0 <= self.pinned_bytes <= self.used_bytes, self
        assert self.retiring_bytes >= 0, self
        assert self.num_graphs >= 0, self
