"""Whether file descriptors run out: told once each time, and once when it is over."""

from __future__ import annotations

import os
import resource

import pytest

from hotgraph_server.observability import descriptors
from hotgraph_server.observability.descriptors import Descriptors


async def test_few_descriptors(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line when more than four in five are open, one when fewer than seven in ten are, and none between."""
    watch = Descriptors()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    caplog.set_level("INFO")
    try:
        for num_open in (10, 80, 81, 90, 75, 100, 71, 70, 69, 20, 79, 81):
            monkeypatch.setattr(descriptors, "_num_open", lambda _, num_open=num_open: num_open)
            watch._look()
    finally:
        watch.stop()
    assert [record.getMessage() for record in caplog.records] == [
        "file descriptors run out: 81 of 100 are open",
        "file descriptors are to be had again: 69 of 100 are open",
        "file descriptors run out: 81 of 100 are open",
    ]


def test_the_number_of_the_next_one_is_how_many_are_open() -> None:
    """Without holes it is exact, it grows with what is opened, and it is the limit when there is none to be had."""
    limit = 1 << 20
    before = descriptors._num_open(limit)
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
    try:
        after = descriptors._num_open(limit)
        assert before + 50 <= after <= len(os.listdir("/proc/self/fd"))
    finally:
        for number in opened:
            os.close(number)
    assert descriptors._num_open(limit) == before
