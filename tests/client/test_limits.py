"""Time limits of blocking reads: what passes, what is lifted, and the one thread behind them."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

from hotgraph_client.limits import limit


def num_watchers() -> int:
    return sum(thread.name == "hotgraph-limits" for thread in threading.enumerate())


def test_each_limit_passes_at_its_end() -> None:
    """Limits pass once each and none before its time, short ones before a long one made earlier, all from one thread."""
    delays = [0.01 * place for place in range(1, 9)]
    random.shuffle(delays)
    delays.insert(0, 1.0)
    passed: list[tuple[float, float]] = []
    all_passed = threading.Event()

    def note(delay: float) -> None:
        passed.append((delay, time.monotonic()))
        if len(passed) == len(delays):
            all_passed.set()

    start = time.monotonic()
    for delay in delays:
        limit(delay, partial(note, delay))
    assert num_watchers() == 1
    assert all_passed.wait(10)
    assert sorted(delay for delay, _ in passed) == sorted(delays)
    assert passed[-1][0] == 1.0
    assert all(end - start >= delay for delay, end in passed)


def test_a_lifted_limit_does_not_pass() -> None:
    """A limit that was lifted calls nothing, though a later one does; the thread ends with the last of them."""
    passed: list[str] = []
    later = threading.Event()
    lifted = limit(0.05, lambda: passed.append("lifted"))
    limit(0.1, later.set)
    lifted.lift()
    assert later.wait(10)
    assert passed == []
    end = time.monotonic() + 10
    while num_watchers():
        assert time.monotonic() < end
        time.sleep(0.005)
    again = threading.Event()
    limit(0.01, again.set)
    assert again.wait(10)
