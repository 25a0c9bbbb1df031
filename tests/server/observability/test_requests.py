"""What steps and ends of requests add up to, against requests whose every step is known; and what counting costs a token."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from hotgraph_server.batch import Phase, StepOutput, StepReceipt
from hotgraph_server.errors import CancelledRequestError
from hotgraph_server.observability.requests import ANONYMOUS, OTHER, ClientCounts, RequestMetrics

MAX_TOKEN_SECONDS = 3e-6


def sequence(last: float | None, *, is_first: bool = True, **changes: Any) -> Any:
    """One choice of a request that came at 10.0 and ran its first step at 12.0; its last token came at `last`."""
    ticket = SimpleNamespace(accept_time=10.0, first_step_time=12.0, is_ended=False, sequences=[])
    made = SimpleNamespace(
        ticket=ticket,
        last_token_time=last,
        finish=None,
        num_prompt_tokens=7,
        num_cached_tokens=4,
        num_completion_tokens=0,
    )
    ticket.sequences.append(made if is_first else object())
    vars(made).update(changes)
    return made


def output(tokens: list[int | None], *, graph: str = "", bucket: int = 0, seconds: float = 0.01) -> StepOutput:
    num_tokens = len(tokens)
    receipt = StepReceipt(Phase.DECODE, graph, num_tokens, num_tokens, bucket or num_tokens, num_tokens, None, seconds)
    return StepOutput(0, tokens, receipt)


def test_gaps_between_tokens() -> None:
    """Each token after a sequence's first is one gap, whichever others came at the same times; first tokens are none."""
    metrics = RequestMetrics(max_clients=0)
    sequences = [sequence(99.0), sequence(99.0), sequence(98.0), sequence(None), sequence(99.0)]
    metrics.step_done(sequences, output([1, 2, 3, 4, 5]), 100.0)
    assert metrics.inter_token_latency.count == 4
    assert metrics.inter_token_latency.total == pytest.approx(1 + 1 + 2 + 1)
    assert metrics.time_to_first_token.count == 1
    assert metrics.time_to_first_token.total == pytest.approx(90.0)
    assert metrics.prefill.total == pytest.approx(88.0)
    assert (metrics.num_query_tokens, metrics.num_hit_tokens) == (7, 4)


def test_tokens_that_nobody_gets_are_not_counted() -> None:
    """No gap and no first token comes of rows without a token, nor of sequences that ended while the step was in flight."""
    metrics = RequestMetrics(max_clients=0)
    ended = sequence(99.0)
    ended.ticket.is_ended = True
    metrics.step_done([sequence(99.0), ended, sequence(99.0, finish="stop")], output([None, 1, 2]), 100.0)
    assert metrics.inter_token_latency.count == metrics.time_to_first_token.count == 0


def test_only_the_first_choice_is_the_first_token() -> None:
    """A request of many choices has one time to first token."""
    metrics = RequestMetrics(max_clients=0)
    metrics.step_done([sequence(None, is_first=False)], output([1]), 100.0)
    assert metrics.time_to_first_token.count == 0
    assert metrics.num_query_tokens == 7


def test_steps_and_their_padding() -> None:
    """Steps are told apart by phase and by whether a graph ran; padding is what the bucket had over what was asked for."""
    metrics = RequestMetrics(max_clients=0)
    metrics.step_done([sequence(99.0)] * 3, output([1, 2, 3], graph="g", bucket=4), 100.0)
    metrics.step_done([sequence(99.0)], output([1], seconds=0.5), 100.0)
    assert metrics.steps[Phase.DECODE, True].count == 1
    assert metrics.steps[Phase.DECODE, False].total == pytest.approx(0.5)
    assert (metrics.num_step_tokens, metrics.num_padding_tokens) == (4, 1)
    assert metrics.rows.total == 4
    assert metrics.padding_ratio.total == pytest.approx(4 / 3 + 1)


def test_a_request_that_never_ran_has_waited_to_its_end() -> None:
    """Who gives up in the queue is part of the queue's times, or a long queue would look short."""
    metrics = RequestMetrics(max_clients=4)
    ticket = sequence(None).ticket
    ticket.first_step_time = None
    ticket.request = SimpleNamespace(prompt_token_ids=(1, 2), client="unix:#me")
    metrics.request_ended(ticket, CancelledRequestError("gone"), 15.0)
    assert metrics.queue.total == pytest.approx(5.0)
    assert metrics.num_ended == {"cancelled": 1}
    assert metrics.clients.num_prompt_tokens == {"me": 2}


def test_names_of_clients_are_bounded() -> None:
    """As many names as are allowed, first come first; addresses are nobody's name, and who proved one cannot be posed as."""
    counts = ClientCounts(2)
    for identity in ("unix:", "ipv4:10.0.0.7:4711", "unix:#a", "token/ops#a", "unix:#b", "ipv4:1.2.3.4:5#c", "unix:#a"):
        counts.add(identity, num_prompt_tokens=1, num_completion_tokens=2)
    assert counts.num_requests == {ANONYMOUS: 2, "a": 2, "token/ops#a": 1, OTHER: 2}
    assert sum(counts.num_completion_tokens.values()) == 14
    nobody = ClientCounts(0)
    nobody.add("unix:#a", num_prompt_tokens=1, num_completion_tokens=1)
    assert not nobody.num_requests


def test_counting_costs_a_token_little() -> None:
    """A decode step of 64 sequences costs less than a few microseconds a token, and one sequence alone little more."""
    for num_rows in (1, 64):
        metrics = RequestMetrics(max_clients=0)
        rows, done = [sequence(99.0) for _ in range(num_rows)], output(list(range(num_rows)), graph="g")
        fastest = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(50):
                metrics.step_done(rows, done, 99.01)
            fastest = min(fastest, (time.perf_counter() - begin) / 50)
        print(f"{num_rows} rows: {fastest * 1e6:.2f} us a step, {fastest / num_rows * 1e6:.3f} us a token")
        assert fastest < 10 * MAX_TOKEN_SECONDS + num_rows * MAX_TOKEN_SECONDS / 10
