"""Tests of bench/sample.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.bench.sample import Sample, ServerView


def make(token_times: list[float], *, scheduled: float = 1.0, sent: float = 1.5, end: float = 9.0) -> Sample:
    return Sample(
        index=0,
        client=0,
        num_prompt_tokens=4,
        max_tokens=8,
        scheduled=scheduled,
        sent=sent,
        end=end,
        token_times=token_times,
    )


def test_latencies_count_from_the_schedule() -> None:
    """TTFT and end-to-end start when the request was due, not when a late generator sent it."""
    sample = make([3.0, 4.0, 6.0])
    assert sample.time_to_first_token == 2.0
    assert sample.end_to_end == 8.0
    assert sample.lag == 0.5


def test_tpot_and_gaps() -> None:
    """TPOT is (last - first) / (tokens - 1), ITL each gap."""
    sample = make([3.0, 4.0, 6.0])
    assert sample.time_per_output_token == 1.5
    assert sample.inter_token_latencies == [1.0, 2.0]


def test_tokens_of_one_event_have_no_gap() -> None:
    """Tokens that came together count as together: the gap before them is not shared out."""
    assert make([3.0, 5.0, 5.0, 5.0]).inter_token_latencies == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("token_times", [[], [3.0]])
def test_one_token_has_no_tpot(token_times: list[float]) -> None:
    """With fewer than two tokens there is no time per token."""
    sample = make(token_times)
    assert sample.time_per_output_token is None
    assert sample.inter_token_latencies == []
    assert sample.time_to_first_token == (2.0 if token_times else None)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50).map(sorted))
def test_gaps_add_up(token_times: list[float]) -> None:
    """The mean gap of a request is its TPOT."""
    sample = make(token_times)
    gaps = sample.inter_token_latencies
    assert sum(gaps) / len(gaps) == pytest.approx(sample.time_per_output_token, abs=1e-6)


def test_the_first_failure_is_kept() -> None:
    """What failed first is why a request failed."""
    sample = make([])
    assert sample.is_ok
    sample.fail("QUEUE_FULL", "come back later")
    sample.fail("STREAM_LOST", "gone")
    assert not sample.is_ok
    assert (sample.error, sample.error_message) == ("QUEUE_FULL", "come back later")


@pytest.mark.parametrize("server", [None, ServerView(0.1, 0.2, 0.3, 0.4, 4, 1, 5, 6, 0)])
def test_a_dictionary_and_back(server: ServerView | None) -> None:
    """A sample survives its JSON form whole."""
    sample = make([3.0, 4.0])
    sample.server = server
    assert Sample.from_dict(sample.to_dict()) == sample
