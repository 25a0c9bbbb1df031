"""The record of a generation over several connections, without a channel: states, losses, waits, and text without a seam."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph.v1.inference_service_pb2 import GenerateRequest, GenerateResponse
from hotgraph_client import (
    CancelledRequestError,
    DeadlineError,
    DrainingError,
    EngineFailedError,
    Event,
    Finished,
    HotgraphError,
    InternalError,
    InvalidRequestError,
    LoadingError,
    QueueFullError,
    ResourceExhaustedError,
    ResumePolicy,
    ServerTimeLimitError,
    Started,
    StreamLostError,
    Tokens,
    UnavailableError,
)
from hotgraph_client.requests import generation_spec
from hotgraph_client.resume import TRANSITIONS, GenerationProgress, StreamState, is_loss
from tests.client import scripted_model

ENDLESS = ResumePolicy(max_losses=1000, max_attempts=1000)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def progress_of(
    policy: ResumePolicy = ENDLESS, clock: Clock | None = None, factor: float = 1.0, **options: Any
) -> GenerationProgress:
    """A generation whose jitter is a fixed factor."""
    spec = generation_spec("go on", **({"seed": 1} | options))
    return GenerationProgress(spec, policy, clock=clock or Clock(), uniform=lambda low, high: factor)


def messages(request: GenerateRequest, *texts: str, size: int = 1) -> Iterator[GenerateResponse]:
    return scripted_model.messages(request, texts, itertools.repeat(size))


def feed(progress: GenerationProgress, num_messages: int, *texts: str) -> None:
    """Opens a connection and takes so many of its messages."""
    for message in itertools.islice(messages(progress.open().request, *texts), num_messages):
        progress.receive(message)


def reach(state: StreamState) -> GenerationProgress:
    """A generation in this state."""
    progress = progress_of()
    if state in (StreamState.OPEN, StreamState.LOST):
        feed(progress, 2, "abc")
    if state is StreamState.LOST:
        progress.lose(UnavailableError("gone"))
    if state is StreamState.ENDED:
        progress.cancel()
    assert progress.state is state
    return progress


@pytest.mark.parametrize(("before", "after"), list(itertools.product(StreamState, StreamState)))
def test_all_pairs_of_states(before: StreamState, after: StreamState) -> None:
    """A generation moves from one state to another where the table says so, and nowhere else."""
    progress = reach(before)
    if after in TRANSITIONS[before]:
        progress._move(after)
        assert progress.state is after
    else:
        with pytest.raises(RuntimeError, match="cannot go from"):
            progress._move(after)


@pytest.mark.parametrize(
    ("error", "before_answer", "after_answer"),
    [
        (UnavailableError("Stream removed (Socket closed)"), True, True),
        (UnavailableError("failed to connect to all addresses; last error: refused"), False, True),
        (UnavailableError("DNS resolution failed for nowhere"), False, True),
        (ResourceExhaustedError("bare"), False, True),
        (InternalError("reset"), True, True),
        (HotgraphError("?", code=grpc.StatusCode.UNKNOWN), True, True),
        (CancelledRequestError("by a proxy"), True, True),
        (CancelledRequestError("told", reason="CANCELLED"), True, True),
        (StreamLostError("idle"), True, True),
        (QueueFullError("full", reason="QUEUE_FULL"), False, True),
        (LoadingError("loading", reason="LOADING"), False, True),
        (DrainingError("draining", reason="DRAINING"), False, True),
        (EngineFailedError("failed", reason="ENGINE_FAILED"), False, True),
        (InternalError("ours", reason="INTERNAL"), False, False),
        (InvalidRequestError("wrong", reason="INVALID_REQUEST"), False, False),
        (InvalidRequestError("wrong"), False, False),
        (DeadlineError("late"), False, False),
        (ServerTimeLimitError("late", reason="SERVER_TIME_LIMIT"), False, False),
    ],
)
def test_what_is_a_loss(error: HotgraphError, before_answer: bool, after_answer: bool) -> None:
    """Every bare end but errors of the request and deadlines is a loss, of the daemon's own words only "come back later"."""
    assert is_loss(error, is_reached=False) is before_answer
    assert is_loss(error, is_reached=True) is after_answer


def test_waits_double_and_end() -> None:
    """Tries in a row wait twice as long each, up to the longest, and the last one raises."""
    policy = ResumePolicy(max_attempts=5, first_backoff_seconds=0.1, max_backoff_seconds=0.5)
    progress = progress_of(policy)
    feed(progress, 2, "abc")
    waits = [progress.lose(UnavailableError("gone"))]
    for _ in range(4):
        progress.open()
        waits.append(progress.lose(UnavailableError("still gone")))
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    progress.open()
    with pytest.raises(StreamLostError, match="still gone"):
        progress.lose(UnavailableError("still gone"))
    assert progress.state is StreamState.ENDED


def test_drops_before_the_first_event_are_bounded() -> None:
    """Connections that break before any event are made up for as often as later ones, then the drop itself is raised."""
    progress = progress_of(ResumePolicy(max_losses=2, max_attempts=100))
    for _ in range(2):
        progress.open()
        assert isinstance(progress.lose(UnavailableError("Socket closed")), float)
    assert progress.open().request.request_id == ""
    with pytest.raises(UnavailableError, match="Socket closed"):
        progress.lose(UnavailableError("Socket closed"))


def test_after_a_drop_a_server_is_looked_for() -> None:
    """Once a connection was there, one that cannot be made is an attempt like those after the first event."""
    progress = progress_of(ResumePolicy(max_losses=1, max_attempts=3))
    progress.open()
    assert isinstance(progress.lose(UnavailableError("Socket closed")), float)
    for _ in range(2):
        progress.open()
        assert isinstance(progress.lose(UnavailableError("failed to connect to all addresses")), float)
    progress.open()
    with pytest.raises(UnavailableError, match="failed to connect"):
        progress.lose(UnavailableError("failed to connect to all addresses"))


def test_an_answer_starts_the_waits_again() -> None:
    """After a connection that was answered the waits begin at the first again, and its loss is counted apart."""
    progress = progress_of(ResumePolicy(max_losses=2, max_attempts=2, first_backoff_seconds=0.1))
    feed(progress, 2, "abcdef")
    assert progress.lose(UnavailableError("gone")) == pytest.approx(0.1)
    progress.open()
    assert progress.lose(UnavailableError("gone")) == pytest.approx(0.2)
    feed(progress, 2, "abcdef")
    assert progress.lose(UnavailableError("gone")) == pytest.approx(0.1)
    feed(progress, 2, "abcdef")
    with pytest.raises(StreamLostError):
        progress.lose(UnavailableError("gone"))


def test_the_time_told_is_kept() -> None:
    """RetryInfo is a lower bound of the wait, and jitter only adds to it."""
    spec = generation_spec("go on", seed=1)
    for low_or_high in (min, max):
        progress = GenerationProgress(spec, uniform=lambda low, high, pick=low_or_high: pick(low, high))  # type: ignore[misc]
        feed(progress, 2, "abc")
        wait = progress.lose(EngineFailedError("failed", reason="ENGINE_FAILED", retry_after_seconds=2.0))
        assert isinstance(wait, float)
        assert 2.0 <= wait <= 2.5


def test_the_deadline_is_for_all() -> None:
    """What is left of the timeout goes out with each connection; when it is over there is none."""
    clock = Clock()
    progress = progress_of(clock=clock, timeout=10.0)
    assert progress.open().timeout_seconds == 10.0
    progress.receive(scripted_model.started(GenerateRequest()))
    clock.now += 4
    progress.lose(UnavailableError("gone"))
    attempt = progress.open()
    assert attempt.timeout_seconds == 6.0
    assert attempt.request.timeout.seconds == 6
    progress.lose(UnavailableError("gone"))
    clock.now += 6
    with pytest.raises(DeadlineError):
        progress.open()


def test_long_request_ids_are_cut() -> None:
    """The fresh id of a resumed request keeps to the contract's 128 characters and ends in the count."""
    progress = progress_of(request_id="x" * 128)
    feed(progress, 2, "abc")
    progress.lose(UnavailableError("gone"))
    request_id = progress.open().request.request_id
    assert len(request_id) == 128
    assert request_id.endswith("x/resume-1")


def test_every_attempt_has_its_own_id() -> None:
    """An id that may be in flight on a half-dead server is never sent again; one the server made is the base of the next."""
    progress = progress_of()
    feed(progress, 2, "abc")
    ids = []
    for _ in range(3):
        progress.lose(UnavailableError("gone"))
        ids.append(progress.open().request.request_id)
    assert ids == [f"made-by-server/resume-{n}" for n in (1, 2, 3)]


def test_unknown_events_are_passed_over() -> None:
    """A message without an event that this client knows gives no event and breaks nothing."""
    progress = progress_of()
    feed(progress, 1, "abc")
    assert progress.receive(GenerateResponse()) is None
    assert progress.state is StreamState.OPEN


def test_completion_needs_the_end() -> None:
    """There is no completion before Finished."""
    progress = progress_of()
    feed(progress, 2, "abc")
    with pytest.raises(RuntimeError, match="not finished"):
        progress.completion()


def test_measured_timings() -> None:
    """When only Finished was lost, times are the client's own: to the first token, between tokens, in all."""
    clock = Clock()
    progress = progress_of(clock=clock)
    for message in itertools.islice(messages(progress.open().request, "abc"), 4):
        clock.now += 1.0
        progress.receive(message)
    clock.now += 1.0
    finished = progress.lose(UnavailableError("gone"))
    assert isinstance(finished, Finished)
    assert finished.timings.time_to_first_token_seconds == 2.0
    assert finished.timings.time_per_output_token_seconds == 1.0
    assert finished.timings.total_seconds == 5.0
    assert finished.timings.is_measured_by_client


def merged(events: list[Event]) -> tuple[dict[int, str], dict[int, list[int]], dict[int, list[int]]]:
    """Text, ids and log-probability ids of each choice, as the caller saw them."""
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    logprob_ids: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Tokens):
            texts[event.choice_index] = texts.get(event.choice_index, "") + event.text
            ids.setdefault(event.choice_index, []).extend(event.token_ids)
            logprob_ids.setdefault(event.choice_index, []).extend(one.chosen.token_id for one in event.logprobs)
    return texts, ids, logprob_ids


# Characters of one to four bytes, and pieces of the stop strings, so that much is held back.
TEXTS = st.lists(st.text(alphabet="aSTOP é€😀\n", min_size=1, max_size=24), min_size=1, max_size=3)
STOPS = st.lists(st.sampled_from(["STOP", "TO", "😀€", "\n\n", "P a"]), max_size=2, unique=True)
LOSSES = st.sampled_from(
    [
        None,
        UnavailableError("gone"),
        InternalError("reset"),
        CancelledRequestError("let go"),
        EngineFailedError("failed", reason="ENGINE_FAILED", retry_after_seconds=0.5),
    ]
)


BREAKS = st.lists(st.tuples(st.integers(min_value=1, max_value=20), LOSSES), max_size=6)
SIZES = st.lists(st.integers(min_value=1, max_value=4), min_size=1, max_size=8)


@settings(max_examples=400, deadline=None)
@given(texts=TEXTS, stops=STOPS, breaks=BREAKS, sizes=SIZES)
def test_no_seam(
    texts: list[str], stops: list[str], breaks: list[tuple[int, HotgraphError | None]], sizes: list[int]
) -> None:
    """However often and wherever a generation breaks, inside characters and half-seen stop strings too, the caller sees
    the ids, text, log-probabilities, ends and usage of an unbroken one, one Started and one Finished."""

    def progress() -> GenerationProgress:
        return progress_of(stop=stops, num_choices=len(texts), resume=True)

    whole = progress()
    expected = [
        event
        for message in scripted_model.messages(whole.open().request, texts, itertools.repeat(1))
        if (event := whole.receive(message))
    ]

    torn = progress()
    events: list[Event] = []
    chunks = itertools.cycle(sizes)
    breaks_left = iter(breaks)
    while not torn.is_ended:
        stream = scripted_model.messages(torn.open().request, texts, chunks)
        num_messages, loss = next(breaks_left, (None, None))
        for message in itertools.islice(stream, num_messages):
            event = torn.receive(message)
            if event is not None:
                events.append(event)
        if not torn.is_ended:
            outcome = torn.lose(loss)
            if isinstance(outcome, Finished):
                events.append(outcome)

    assert merged(events) == merged(expected)
    assert [isinstance(event, Started) for event in events] == [True] + [False] * (len(events) - 1)
    assert [isinstance(event, Finished) for event in events] == [False] * (len(events) - 1) + [True]
    assert torn.completion().choices == whole.completion().choices
    last, expected_last = events[-1], expected[-1]
    assert isinstance(last, Finished)
    assert isinstance(expected_last, Finished)
    assert last.choices == expected_last.choices
    assert last.usage == expected_last.usage
    assert last.num_resumes == torn.num_resumes
