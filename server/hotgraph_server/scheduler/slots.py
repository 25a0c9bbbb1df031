"""Slots: the places of running sequences on the engine. The lowest free one is taken, so that busy slots stay together."""

from __future__ import annotations

import heapq


class SlotPool:
    """Numbers 0 .. num_slots - 1, each held by at most one sequence."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def take(self) -> int:
        """The lowest free slot. Ask `num_free` before."""
        return heapq.heappop(self._free)

    def give_back(self, slot: int) -> None:
        """The slot is free again: no step in flight may still write to it."""
        heapq.heappush(self._free, slot)
