"""Client processes: all streams come back, in whatever process they ran, and what fails is said."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu.streams import clients


def test_every_stream_has_its_tokens_times(daemon_target: str) -> None:
    """Five streams over several clients, twice, give lists of times that grow, by the clock of whoever asked."""
    with clients(daemon_target, 2) as some:
        for _ in range(2):
            begin_seconds = time.perf_counter()
            found = some.token_seconds([[1, 2, 3 + index] for index in range(5)], 4)
            end_seconds = time.perf_counter()
            assert [len(times) for times in found] == [4] * 5
            assert all(begin_seconds < times[0] and times == sorted(times) for times in found)
            assert max(times[-1] for times in found) < end_seconds


def test_a_daemon_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A stream's error reaches whoever asked, and the clients are stopped."""
    with pytest.raises(RuntimeError, match="Unavailable"), clients(f"unix:{tmp_path}/none", 2) as some:
        some.token_seconds([[1, 2, 3]] * 3, 4)
