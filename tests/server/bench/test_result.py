"""Tests of bench/result.py."""

import numpy as np
import pytest

from hotgraph_server.bench.load import Limit, closed_loop
from hotgraph_server.bench.result import evaluate
from hotgraph_server.bench.sample import Sample, ServerView

from .virtual_time import NumberedWorkload, ScriptedSender, VirtualClock, run_virtually


def make(index: int, *, scheduled: float, token_times: list[float], end: float, error: str = "") -> Sample:
    sample = Sample(index, 0, 10, len(token_times), scheduled, scheduled, end, token_times, num_events=len(token_times))
    if error:
        sample.fail(error, f"{error} of {index}")
    return sample


def test_latencies_equal_numpy_on_known_samples() -> None:
    """Every figure of a run is numpy's of the same samples."""
    random = np.random.default_rng(0)
    samples = []
    for index in range(200):
        scheduled = float(random.uniform(0, 10))
        token_times = list(scheduled + np.cumsum(random.exponential(0.01, int(random.integers(1, 20)))))
        samples.append(make(index, scheduled=scheduled, token_times=token_times, end=token_times[-1] + 0.001))
    result = evaluate(samples)
    expected: dict[str, list[float]] = {
        "ttft": [s.token_times[0] - s.scheduled for s in samples],
        "tpot": [
            (s.token_times[-1] - s.token_times[0]) / (len(s.token_times) - 1) for s in samples if len(s.token_times) > 1
        ],
        "itl": [float(gap) for s in samples for gap in np.diff(s.token_times)],
        "end_to_end": [s.end - s.scheduled for s in samples],
    }
    for name, values in expected.items():
        summary = result.latencies[name]
        assert summary is not None
        assert summary.count == len(values)
        assert summary.mean == pytest.approx(np.mean(values))
        figures = (summary.p50, summary.p95, summary.p99)
        assert figures == pytest.approx(tuple(np.percentile(values, (50, 95, 99))))
        assert (summary.minimum, summary.maximum) == (min(values), max(values))
    seconds = max(s.end for s in samples) - min(s.scheduled for s in samples)
    num_tokens = sum(len(s.token_times) for s in samples)
    assert result.throughput.output_tokens_per_second == pytest.approx(num_tokens / seconds)
    assert result.throughput.total_tokens_per_second == pytest.approx((num_tokens + 2000) / seconds)
    assert result.throughput.requests_per_second == pytest.approx(200 / seconds)


def test_failures_count_by_reason_and_nowhere_else() -> None:
    """A failed request adds to no latency and no rate, but its time counts, and its reason is told with an example."""
    samples = [
        make(0, scheduled=0.0, token_times=[1.0, 2.0], end=2.0),
        make(1, scheduled=0.0, token_times=[0.1, 0.2], end=0.2, error="STREAM_LOST"),
        make(2, scheduled=0.0, token_times=[], end=0.1, error="QUEUE_FULL"),
        make(3, scheduled=0.0, token_times=[], end=4.0, error="QUEUE_FULL"),
    ]
    result = evaluate(samples)
    assert (result.num_requests, result.num_ok, result.num_failed) == (4, 1, 3)
    assert result.errors == {"QUEUE_FULL": 2, "STREAM_LOST": 1}
    assert result.error_examples == {"QUEUE_FULL": "QUEUE_FULL of 2", "STREAM_LOST": "STREAM_LOST of 1"}
    ttft = result.latencies["ttft"]
    assert ttft is not None
    assert (ttft.count, ttft.minimum) == (1, 1.0)
    assert result.throughput.num_output_tokens == 2
    assert result.throughput.output_tokens_per_second == 2 / 4.0
    assert any("3 of 4 requests failed" in warning for warning in result.warnings)


@pytest.mark.parametrize("samples", [[], [make(0, scheduled=0.0, token_times=[], end=1.0, error="UNAVAILABLE")]])
def test_a_run_without_success_has_no_latency(samples: list[Sample]) -> None:
    """Nothing that went well: no figures at all, rather than zeros."""
    result = evaluate(samples)
    assert result.num_ok == 0
    assert all(result.latencies[name] is None for name in ("ttft", "tpot", "itl", "end_to_end"))
    assert result.throughput.output_tokens_per_second == 0


def test_what_the_server_told_is_summed_up() -> None:
    """The server's times, cached tokens and steps come from the receipts; cached tokens are warned of."""
    samples = []
    for index in range(3):
        sample = make(index, scheduled=0.0, token_times=[0.5, 0.6], end=0.7)
        sample.server = ServerView(0.1 * index, 0.2, 0.4, 0.6, 10, 4, 5, 1, index)
        samples.append(sample)
    result = evaluate(samples)
    queue = result.latencies["server_queue"]
    assert queue is not None
    assert queue.maximum == pytest.approx(0.2)
    assert (result.num_cached_prompt_tokens, result.num_graph_steps, result.num_eager_steps) == (12, 15, 3)
    assert result.num_preemptions == 3
    assert any("12 prompt tokens" in warning for warning in result.warnings)


def test_a_late_generator_is_told() -> None:
    """When the bench itself was late, the result says so."""
    sample = make(0, scheduled=0.0, token_times=[1.0], end=1.0)
    sample.sent = 0.1
    assert any("the load generator itself was late" in warning for warning in evaluate([sample]).warnings)
    sample.sent = 0.0
    assert not any("late" in warning for warning in evaluate([sample]).warnings)


def test_failures_of_a_run_are_counted() -> None:
    """Requests that the server refuses are counted by a whole run, and the others are not lost."""
    sender = ScriptedSender(0.3, failing=frozenset({1, 3, 5}))
    samples = run_virtually(
        lambda: closed_loop(sender, NumberedWorkload(), VirtualClock(), Limit(num_requests=10), num_clients=2)
    )
    result = evaluate(samples)
    assert (result.num_ok, result.errors) == (7, {"QUEUE_FULL": 3})
    assert result.throughput.num_output_tokens == 21
