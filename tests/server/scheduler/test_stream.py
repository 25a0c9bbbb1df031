"""Tests of scheduler/stream.py."""

from __future__ import annotations

import asyncio

import pytest

from hotgraph_server.errors import DeadlineError
from hotgraph_server.request import (
    ChoiceFinish,
    FinishedEvent,
    FinishReason,
    Receipt,
    Request,
    Timings,
    TokensEvent,
    Usage,
)
from hotgraph_server.scheduler.stream import RequestStream

REQUEST = Request("r", (1,), 10)
DONE = FinishedEvent((), Usage(1, 2, 0), Timings(0, 0, 0, 0, None, 0), Receipt(0, 0, 0, 0, ()))


def tokens(*ids: int, choice: int = 0, finish: ChoiceFinish | None = None) -> TokensEvent:
    return TokensEvent(choice, list(ids), "".join(map(chr, ids)), [], finish)


async def test_tokens_gather_while_the_reader_is_away() -> None:
    """Tokens of one choice that were not read yet come as one event; choices stay apart; the end comes last."""
    stream = RequestStream(REQUEST, lambda: None)
    finish = ChoiceFinish(0, FinishReason.STOP)
    stream.put(tokens(65))
    stream.put(tokens(70, choice=1))
    stream.put(tokens(66, 67, finish=finish))
    stream.end(DONE)
    events = [event async for event in stream]
    assert events == [TokensEvent(0, [65, 66, 67], "ABC", [], finish), tokens(70, choice=1), DONE]


async def test_a_waiting_reader_is_woken() -> None:
    """An event that arrives while the reader waits is delivered at once."""
    stream = RequestStream(REQUEST, lambda: None)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.put(tokens(65))
    assert await asyncio.wait_for(reading, 1) == tokens(65)


async def test_what_came_before_an_error_is_delivered_before_it() -> None:
    """An error ends the stream after the tokens that were there, and is raised again on another read."""
    stream = RequestStream(REQUEST, lambda: None)
    stream.put(tokens(65))
    stream.end(DeadlineError("late"))
    assert await anext(stream) == tokens(65)
    for _ in range(2):
        with pytest.raises(DeadlineError):
            await anext(stream)


async def test_closing_cancels_once_and_only_what_runs() -> None:
    """Leaving a running stream tells the scheduler; leaving a finished one does not."""
    calls: list[str] = []
    stream = RequestStream(REQUEST, lambda: calls.append("closed"))
    async with stream:
        stream.put(tokens(65))
    stream.end(DONE)
    stream.close()
    assert calls == ["closed"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    finished = RequestStream(REQUEST, lambda: calls.append("closed again"))
    finished.end(DONE)
    async with finished:
        assert await anext(finished) == DONE
    assert calls == ["closed"]


async def test_the_first_end_counts() -> None:
    """An error after the end changes nothing."""
    stream = RequestStream(REQUEST, lambda: None)
    stream.end(DONE)
    stream.end(DeadlineError("late"))
    assert [event async for event in stream] == [DONE]


async def test_a_wait_ends_with_an_event_that_stays_or_with_its_time() -> None:
    """Waiting takes no event, ends as soon as there is one or the end, and else when its time is over."""
    stream = RequestStream(REQUEST, lambda: None)
    async with asyncio.timeout(5):
        await stream.wait(0.001)
        waiting = asyncio.ensure_future(stream.wait(60))
        await asyncio.sleep(0)
        stream.put(tokens(65))
        await waiting
        await stream.wait(60)
        assert await anext(stream) == tokens(65)
        stream.end(DONE)
        await stream.wait(60)
        assert await anext(stream) == DONE
