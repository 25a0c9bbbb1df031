"""Streams over the wire that lost their server, for both clients: what goes on, what does not, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from hotgraph_client import (
    DeadlineError,
    EngineFailedError,
    Event,
    Finished,
    FinishReason,
    GraphNotReadyError,
    HotgraphError,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    ResumePolicy,
    Started,
    StreamLostError,
    Tokens,
    UnavailableError,
)
from tests.client.drivers import Driver
from tests.client.scripted_model import SEED
from tests.client.scripted_server import (
    Act,
    Relay,
    ScriptedServer,
    broken,
    cut_after,
    end,
    error_info,
    fail,
    hang,
    retry_info,
    serving,
    whole,
)

TEXT = "naïve 😀 end"
LOSS_CODES = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
]


def text_of(events: list[Event], choice_index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Tokens) and e.choice_index == choice_index)


def ids_of(events: list[Event], choice_index: int = 0) -> list[int]:
    return [i for e in events if isinstance(e, Tokens) and e.choice_index == choice_index for i in e.token_ids]


@pytest.mark.parametrize("code", LOSS_CODES)
@pytest.mark.parametrize("num_messages", [1, 4, 9])
async def test_a_lost_stream_goes_on(
    server: ScriptedServer, driver: Driver, code: grpc.StatusCode, num_messages: int
) -> None:
    """Whatever the code, a stream that ended before Finished goes on from its tokens, and the caller sees one stream."""
    server.play(broken(fail(code), num_messages, TEXT), whole(TEXT))
    events = await driver.events(seed=7, request_id="mine")
    assert text_of(events) == TEXT
    assert ids_of(events) == list(TEXT.encode())
    assert [type(event) for event in events].count(Started) == 1
    assert isinstance(events[0], Started)
    assert events[0].request_id == "mine"
    assert isinstance(events[-1], Finished)
    assert events[-1].num_resumes == 1
    assert events[-1].usage.completion_tokens == len(TEXT.encode())
    first, second = server.requests
    assert second.sampling.seed == 7
    assert first.request_id == "mine"
    assert second.request_id == "mine/resume-1"
    assert second.model == "scripted"
    if num_messages > 1:
        assert [(c.index, list(c.token_ids)) for c in second.resume] == [(0, list(TEXT.encode()[: num_messages - 1]))]
    else:
        assert not second.resume


async def test_an_ok_end_without_finished_is_a_loss(server: ScriptedServer, driver: Driver) -> None:
    """A stream that ends with OK but without Finished goes on too."""
    server.play(broken(end, 3, TEXT), whole(TEXT))
    assert (await driver.result(temperature=0)).text == TEXT
    assert len(server.requests) == 2


async def test_a_cut_socket_is_a_loss(
    server: ScriptedServer, connect: Callable[..., Any], tmp_path: Path, socket_path: Path
) -> None:
    """A connection that breaks under the stream is made up for, several times, inside a character too."""
    async with Relay(tmp_path / "r.sock", socket_path).running() as relay:
        driver = await connect(relay.target)
        seen: asyncio.Queue[Event] = asyncio.Queue()
        # A resumed connection begins with a Started that the caller does not see.
        acts = [broken(cut_after(relay, seen, n), m, TEXT) for m, n in ((4, 4), (6, 5), (4, 3))]
        server.play(*acts, whole(TEXT))
        loop = asyncio.get_running_loop()
        completion = await driver.result(
            seed=1, on_event=lambda event: loop.call_soon_threadsafe(seen.put_nowait, event)
        )
        assert completion.text == TEXT
        assert completion.token_ids == tuple(TEXT.encode())
        assert completion.num_resumes == 3


def headers_then_cut(relay: Relay) -> Act:
    """Sends the headers, gives them time to arrive, and cuts the relay before the first event."""

    async def act(request: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        await asyncio.sleep(0.05)
        relay.cut()
        await hang(request, context)

    return act


@pytest.mark.parametrize("num_cuts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"seed": 1, "request_id": "mine"}])
async def test_a_cut_between_headers_and_first_event(
    server: ScriptedServer,
    connect: Callable[..., Any],
    tmp_path: Path,
    socket_path: Path,
    num_cuts: int,
    options: dict[str, Any],
) -> None:
    """Nothing was told yet: the request goes out again as it was, seeded or not, and the caller sees one whole answer."""
    async with Relay(tmp_path / "r.sock", socket_path).running() as relay:
        driver = await connect(relay.target)
        server.play(*[headers_then_cut(relay)] * num_cuts, whole(TEXT))
        events = await driver.events(**options)
        assert text_of(events) == TEXT
        assert [type(event) for event in events].count(Started) == 1
        assert isinstance(events[-1], Finished)
        assert events[-1].num_resumes == 0
        # gRPC would have sent it four times each: it does not after headers, so each further request is the client's own.
        assert len(server.requests) == num_cuts + 1
        assert not any(request.resume for request in server.requests)
        assert len({request.sampling.SerializeToString() for request in server.requests}) == 1
        if "request_id" in options:
            assert [r.request_id for r in server.requests[1:]] == [f"mine/resume-{n}" for n in range(1, num_cuts + 1)]


@pytest.mark.parametrize(
    ("settings", "options", "num_requests"),
    [
        ({"resume_policy": ResumePolicy(max_losses=2, first_backoff_seconds=0.01)}, {"seed": 1}, 3),
        ({}, {"resume": False}, 1),
    ],
)
async def test_cuts_before_the_first_event_end(
    server: ScriptedServer,
    connect: Callable[..., Any],
    tmp_path: Path,
    socket_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    num_requests: int,
) -> None:
    """They are bounded by max_losses, and with resume=False the first one is raised, as what gRPC said."""
    async with Relay(tmp_path / "r.sock", socket_path).running() as relay:
        driver = await connect(relay.target, **settings)
        server.play(headers_then_cut(relay))
        events, error = await driver.partial(**options)
        assert events == []
        assert isinstance(error, UnavailableError)
        assert len(server.requests) == num_requests


async def test_a_server_that_was_never_there_is_told_soon(connect: Callable[..., Any], tmp_path: Path) -> None:
    """Where nothing listens gRPC's own tries are all: the client does not look for a server that it never reached."""
    driver = await connect(
        f"unix:{tmp_path}/none", max_attempts=1, resume_policy=ResumePolicy(first_backoff_seconds=60, max_attempts=9)
    )
    async with asyncio.timeout(20):
        _, error = await driver.partial(seed=1)
    assert isinstance(error, UnavailableError)
    assert "failed to connect" in str(error)


async def test_choices_that_ended_are_not_asked_again(server: ScriptedServer, driver: Driver) -> None:
    """After a loss only unfinished choices are resumed, those without a token included, and all are in the end."""
    # Started, then in turns: "a" (ends), "b", "c" then lost.
    server.play(broken(fail(grpc.StatusCode.UNAVAILABLE), 3, "a", "bbb", "ccc"), whole("a", "bbb", "ccc"))
    completion = await driver.result(num_choices=3, seed=3)
    assert [choice.text for choice in completion.choices] == ["a", "bbb", "ccc"]
    assert [(c.index, list(c.token_ids)) for c in server.requests[1].resume] == [(1, list(b"b")), (2, [])]
    assert completion.usage.completion_tokens == 7
    assert all(choice.finish is not None for choice in completion.choices)


async def test_only_finished_lost(server: ScriptedServer, driver: Driver) -> None:
    """When every choice is whole and only Finished is missing, nothing is asked again and the client measures the times."""
    server.play(broken(fail(grpc.StatusCode.INTERNAL), 4, "abc"))
    completion = await driver.result(seed=3)
    assert completion.text == "abc"
    assert len(server.requests) == 1
    assert completion.timings.is_measured_by_client
    assert completion.usage.completion_tokens == 3
    assert completion.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("options", "is_resumed"),
    [
        ({}, False),
        ({"seed": 1}, True),
        ({"temperature": 0.0}, True),
        ({"seed": 1, "resume": False}, False),
        ({"resume": True}, True),
    ],
)
async def test_when_it_goes_on(
    server: ScriptedServer, driver: Driver, options: dict[str, Any], is_resumed: bool
) -> None:
    """By default seeded and greedy requests go on; resume=True does it always, with the seed told, and False never."""
    server.play(broken(fail(grpc.StatusCode.UNAVAILABLE, "gone"), 3, "abc"), whole("abc"))
    events, error = await driver.partial(**options)
    assert text_of(events) == ("abc" if is_resumed else "ab")
    if is_resumed:
        assert error is None
        assert server.requests[1].sampling.seed == options.get("seed", SEED)
    else:
        assert isinstance(error, StreamLostError)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.choices[0].text == "ab"
        assert "gone" in error.message
        assert len(server.requests) == 1


async def test_the_daemons_own_word_in_the_middle(server: ScriptedServer, driver: Driver) -> None:
    """ENGINE_FAILED and DRAINING in the middle are losses that go on, after the time that was told."""
    failed = fail(grpc.StatusCode.UNAVAILABLE, "failed", error_info("ENGINE_FAILED"), retry_info(0.05))
    loading = fail(grpc.StatusCode.UNAVAILABLE, "loading", error_info("LOADING"), retry_info(0.01))
    server.play(broken(failed, 3, "abc"), loading, loading, loading, loading, whole("abc"))
    start = asyncio.get_running_loop().time()
    assert (await driver.result(seed=1)).text == "abc"
    assert asyncio.get_running_loop().time() - start >= 0.05


async def test_typed_loss_without_resume(server: ScriptedServer, driver: Driver) -> None:
    """With resume off the daemon's own error is raised as it is."""
    failed = fail(grpc.StatusCode.UNAVAILABLE, "failed", error_info("ENGINE_FAILED"), retry_info(2))
    server.play(broken(failed, 3, "abc"))
    _, error = await driver.partial(seed=1, resume=False)
    assert isinstance(error, EngineFailedError)
    assert error.retry_after_seconds == 2


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.INTERNAL, "INTERNAL", InternalError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "SERVER_TIME_LIMIT", DeadlineError),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", InvalidRequestError),
        (grpc.StatusCode.INVALID_ARGUMENT, "", InvalidRequestError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", DeadlineError),
    ],
)
async def test_what_is_no_loss(
    server: ScriptedServer, driver: Driver, code: grpc.StatusCode, reason: str, expected: type[HotgraphError]
) -> None:
    """Errors of the request, deadlines and the daemon's own mistakes end the stream for good."""
    server.play(broken(fail(code, "no", *([error_info(reason)] if reason else [])), 3, "abc"), whole("abc"))
    _, error = await driver.partial(seed=1)
    assert isinstance(error, expected)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reason", "code", "expected"),
    [
        ("QUEUE_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFullError),
        ("GRAPH_NOT_READY", grpc.StatusCode.UNAVAILABLE, GraphNotReadyError),
    ],
)
async def test_a_refusal_before_the_answer_is_raised(
    server: ScriptedServer,
    connect: Callable[..., Any],
    reason: str,
    code: grpc.StatusCode,
    expected: type[HotgraphError],
) -> None:
    """Before the first event only gRPC tries again; then the refusal is the caller's."""
    driver = await connect(max_attempts=1)
    server.play(fail(code, "later", error_info(reason), retry_info(3)))
    _, error = await driver.partial(seed=1)
    assert isinstance(error, expected)
    assert error.retry_after_seconds == 3
    assert len(server.requests) == 1


async def test_a_loss_before_the_answer(server: ScriptedServer, driver: Driver) -> None:
    """A bare code that gRPC does not try again, before any event, is tried again even without a seed."""
    server.play(fail(grpc.StatusCode.CANCELLED), whole("abc"))
    assert (await driver.result()).text == "abc"


async def test_attempts_are_bounded(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    """A request that breaks every server it meets is given up after max_losses, and the last loss is told."""
    driver = await connect(resume_policy=ResumePolicy(max_losses=2, first_backoff_seconds=0.01))
    server.play(broken(fail(grpc.StatusCode.UNKNOWN), 2, "abcdefgh"))
    events, error = await driver.partial(seed=1)
    assert isinstance(error, StreamLostError)
    assert text_of(events) == "abc"
    assert len(server.requests) == 3


async def test_no_server_comes_back(connect: Callable[..., Any], kind: str, tmp_path: Path, socket_path: Path) -> None:
    """When no server answers again the attempts run out and the loss is told, with what came."""
    scripted = ScriptedServer()
    driver = await connect(max_attempts=1, resume_policy=ResumePolicy(max_attempts=3, first_backoff_seconds=0.01))
    async with serving(scripted, f"unix:{socket_path}"):
        scripted.play(broken(hang, 3, "abc"))
        reading = asyncio.ensure_future(driver.partial(seed=1))
        await scripted.until(lambda: scripted.num_active == 1)
    events, error = await reading
    assert isinstance(error, UnavailableError)
    assert text_of(events) in ("", "a", "ab")


async def test_another_model_behind_the_same_name(server: ScriptedServer, driver: Driver) -> None:
    """A server that would go on with another prompt or seed is not trusted: the loss is raised."""
    other = whole("abc")

    async def lies(request: Any, context: Any) -> None:
        request.sampling.seed += 1
        await other(request, context)

    server.play(broken(fail(grpc.StatusCode.UNKNOWN), 3, "abc"), lies)
    events, error = await driver.partial(seed=1)
    assert isinstance(error, StreamLostError)
    assert text_of(events) == "ab"


async def test_the_deadline_holds_over_resumes(server: ScriptedServer, driver: Driver) -> None:
    """A resumed call gets what is left of the timeout, in the call's deadline and in the request's field."""
    left: list[float] = []

    async def note(request: Any, context: Any) -> None:
        left.append(context.time_remaining())
        await whole("abc")(request, context)

    server.play(broken(fail(grpc.StatusCode.UNKNOWN), 2, "abc"), note)
    await driver.result(seed=1, timeout=5.0)
    first, second = (request.timeout.ToTimedelta().total_seconds() for request in server.requests)
    assert first == 5.0
    assert 0 < second < 5.0
    assert left[0] <= second + 0.2  # gRPC rounds a deadline up on its way


async def test_no_wait_beyond_the_deadline(server: ScriptedServer, driver: Driver) -> None:
    """When the time told to wait is beyond the deadline the loss is raised at once."""
    failed = fail(grpc.StatusCode.UNAVAILABLE, "failed", error_info("ENGINE_FAILED"), retry_info(60))
    server.play(broken(failed, 2, "abc"))
    async with asyncio.timeout(5):
        _, error = await driver.partial(seed=1, timeout=30)
    assert isinstance(error, EngineFailedError)


async def test_idle_stream_counts_as_lost(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    """With idle_seconds a stream whose tokens pause is left for another server."""
    driver = await connect(resume_policy=ResumePolicy(idle_seconds=0.1, first_backoff_seconds=0.01))
    server.play(broken(hang, 3, "abc"), whole("abc"))
    completion = await driver.result(seed=1)
    assert completion.text == "abc"
    assert completion.num_resumes == 1
    await server.until(lambda: server.num_active == 0)
