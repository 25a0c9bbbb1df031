"""Tests of bench/load.py, in virtual time."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from hotgraph_server.bench.arrivals import arrival_times
from hotgraph_server.bench.load import Limit, closed_loop, open_loop
from hotgraph_server.bench.sample import Sample

from .virtual_time import NumberedWorkload, ScriptedSender, VirtualClock, run_virtually


def closed(sender: ScriptedSender, limit: Limit, **options: Any) -> list[Sample]:
    return run_virtually(lambda: closed_loop(sender, NumberedWorkload(), VirtualClock(), limit, **options))


def opened(sender: ScriptedSender, limit: Limit, arrivals: Iterator[float], **options: Any) -> list[Sample]:
    return run_virtually(lambda: open_loop(sender, NumberedWorkload(), VirtualClock(), limit, arrivals, **options))


def test_a_closed_loop_keeps_every_client_busy() -> None:
    """Four clients have four requests under way, never more, and send the next the moment one ended."""
    sender = ScriptedSender(0.3)
    samples = closed(sender, Limit(num_requests=40), num_clients=4)
    assert sender.max_active == 4
    assert [sample.index for sample in samples] == list(range(40))
    assert max(sample.end for sample in samples) == pytest.approx(3.0)
    assert {sample.client for sample in samples} == {0, 1, 2, 3}
    assert all(sample.lag == 0 for sample in samples)
    assert all(sample.time_per_output_token == pytest.approx(0.1) for sample in samples)


def test_a_closed_loop_ends_at_its_duration() -> None:
    """No request starts at or after the limit, and the ones under way are finished and counted."""
    samples = closed(ScriptedSender(0.3), Limit(duration_seconds=1.0), num_clients=2)
    assert len(samples) == 8
    assert max(sample.scheduled for sample in samples) == pytest.approx(0.9)
    assert max(sample.end for sample in samples) == pytest.approx(1.2)
    assert all(sample.is_ok for sample in samples)


def test_gaps_between_requests() -> None:
    """A client with a gap rests between its requests, and the rest is no latency."""
    samples = closed(ScriptedSender(0.3), Limit(num_requests=3), num_clients=1, gap_seconds=2.0)
    assert [sample.scheduled for sample in samples] == pytest.approx([0.0, 2.3, 4.6])
    assert all(sample.end_to_end == pytest.approx(0.3) for sample in samples)


def test_more_clients_than_requests() -> None:
    """Clients for whom no request is left send none."""
    assert len(closed(ScriptedSender(0.3), Limit(num_requests=3), num_clients=10)) == 3


def test_an_open_loop_is_not_slowed_by_the_server() -> None:
    """A server that serves one at a time at half the rate gets every request when it is due all the same; the latency
    grows as the queue does, because it counts from the arrival."""
    sender = ScriptedSender(0.2, num_servers=1)
    samples = opened(sender, Limit(num_requests=50), arrival_times(10.0, kind="constant"))
    assert [moment for _, moment in sender.sent] == pytest.approx([0.1 * number for number in range(1, 51)])
    assert [sample.scheduled for sample in samples] == pytest.approx([moment for _, moment in sender.sent])
    assert samples[0].end_to_end == pytest.approx(0.2)
    assert samples[49].end_to_end == pytest.approx(0.2 * 50 - 0.1 * 49)
    assert sender.max_active > 20


def test_an_open_loop_follows_the_poisson_schedule() -> None:
    """Requests go out at the moments of the schedule, whose rate they have."""
    sender = ScriptedSender(0.05)
    samples = opened(sender, Limit(num_requests=500), arrival_times(20.0, seed=9))
    expected = list(itertools.islice(arrival_times(20.0, seed=9), 500))
    assert [sample.scheduled for sample in samples] == expected
    assert [moment for _, moment in sender.sent] == pytest.approx(expected)


def test_an_open_loop_ends_at_its_duration() -> None:
    """Arrivals at or after the limit are not sent; those before are finished."""
    samples = opened(ScriptedSender(5.0), Limit(duration_seconds=1.0), arrival_times(4.0, kind="constant"))
    assert [sample.scheduled for sample in samples] == pytest.approx([0.25, 0.5, 0.75])
    assert max(sample.end for sample in samples) == pytest.approx(5.75)


def test_a_late_generator_keeps_the_moments() -> None:
    """Arrivals that are past when their turn comes go out at once and count from when they were due."""
    samples = opened(ScriptedSender(0.1), Limit(num_requests=3), iter([-2.0, -1.0, 0.5]))
    assert [sample.lag for sample in samples] == pytest.approx([2.0, 1.0, 0.0])
    assert [sample.end_to_end for sample in samples] == pytest.approx([2.1, 1.1, 0.1])


def test_every_sample_is_reported_as_it_ends() -> None:
    """The callback sees each sample once, ended."""
    for is_open in (False, True):
        seen: list[Sample] = []
        if is_open:
            samples = opened(ScriptedSender(0.1), Limit(num_requests=5), arrival_times(9.0), report=seen.append)
        else:
            samples = closed(ScriptedSender(0.1), Limit(num_requests=5), num_clients=2, report=seen.append)
        assert sorted(sample.index for sample in seen) == [0, 1, 2, 3, 4]
        assert len(samples) == 5
        assert all(sample.end > 0 for sample in seen)


def test_a_run_needs_a_limit() -> None:
    """A loop that would never end is refused."""
    with pytest.raises(ValueError, match="number of requests or a duration"):
        Limit()
