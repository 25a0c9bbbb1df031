"""Time limits on blocking reads: one thread for all of a process, there while there are limits. It knows no calls.

A `threading.Timer` for each read would start a thread for each, which costs more than the read.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable


class Limit:
    """Calls `on_passed`, in the thread of the limits, unless it is lifted in time."""

    __slots__ = ("_on_passed",)

    def __init__(self, on_passed: Callable[[], object]) -> None:
        self._on_passed: Callable[[], object] | None = on_passed

    def lift(self) -> None:
        """It may just have passed, or pass right now."""
        self._on_passed = None

    def pass_(self) -> None:
        """The time is over."""
        on_passed = self._on_passed
        if on_passed is not None:
            on_passed()


class _Limits:
    """Limits by their ends. Those lifted stay until then: taking them out would cost more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: list[tuple[float, int, Limit]] = []  # a heap
        self._numbers = itertools.count()  # so that equal ends need not be told apart by their limits
        self._is_watched = False

    def add(self, seconds: float, limit: Limit) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            heapq.heappush(self._ends, (end, next(self._numbers), limit))
            if not self._is_watched:
                threading.Thread(target=self._watch, name="hotgraph-limits", daemon=True).start()
                self._is_watched = True
            elif self._ends[0][2] is limit:
                self._changed.notify()  # it sleeps for longer

    def _watch(self) -> None:
        while True:
            with self._changed:
                if not self._ends:
                    self._is_watched = False
                    return
                left_seconds = self._ends[0][0] - time.monotonic()
                if left_seconds > 0:
                    self._changed.wait(left_seconds)
                    continue
                _, _, limit = heapq.heappop(self._ends)
            limit.pass_()


_limits = _Limits()


def _forget() -> None:
    """In a forked child, which has none of its parent's threads, nor its reads."""
    global _limits
    _limits = _Limits()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def limit(seconds: float, on_passed: Callable[[], object]) -> Limit:
    """Calls `on_passed` after so many seconds, in another thread, unless lifted. It must be short, and raise nothing."""
    made = Limit(on_passed)
    _limits.add(seconds, made)
    return made
