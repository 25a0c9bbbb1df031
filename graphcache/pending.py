"""Wishes that wait for the capture thread, best first, bounded. It knows keys and priorities, not graphs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from graphcache.graph import Priority

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Wish:
    priority: Priority
    num_wishes: int
    order: int

    @property
    def rank(self) -> tuple[int, int, int]:
        """Smallest first: the highest priority, then the most often wished for, then the oldest."""
        return (-self.priority, -self.num_wishes, self.order)


class PendingQueue(Generic[K]):
    """At most `max_pending` keys, each once. Not thread-safe: the cache's lock guards it."""

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._wishes: dict[K, _Wish] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._wishes)

    def __contains__(self, key: K) -> bool:
        return key in self._wishes

    def raise_priority(self, key: K, priority: Priority) -> None:
        """Wished for again: counts, and keeps the higher priority. The key must be there."""
        wish = self._wishes[key]
        wish.priority = max(wish.priority, priority)
        wish.num_wishes += 1

    def has_room(self, priority: Priority) -> bool:
        """Whether a wish of this priority would be taken in."""
        return len(self._wishes) < self._max_pending or any(wish.priority < priority for wish in self._wishes.values())

    def push(self, key: K, priority: Priority) -> K | None:
        """Takes a new key in; returns the one that had to leave for it, if any. `has_room` must hold."""
        left: K | None = None
        if len(self._wishes) >= self._max_pending:
            left = max(self._wishes, key=lambda other: self._wishes[other].rank)
            del self._wishes[left]
        self._num_pushed += 1
        self._wishes[key] = _Wish(priority, 1, self._num_pushed)
        return left

    def pop(self) -> K:
        """Takes the best out. Raises IndexError when empty."""
        if not self._wishes:
            raise IndexError("nothing is pending")
        key = min(self._wishes, key=lambda other: self._wishes[other].rank)
        del self._wishes[key]
        return key

    def num_ahead(self, key: K) -> int:
        """How many go before this key; for a key that is not there, were it a new miss."""
        wish = self._wishes.get(key) or _Wish(Priority.MISS, 1, self._num_pushed + 1)
        return sum(other.rank < wish.rank for other in self._wishes.values())

    def clear(self) -> list[K]:
        """Takes all out; returns them."""
        keys = list(self._wishes)
        self._wishes.clear()
        return keys
