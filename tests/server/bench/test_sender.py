"""Tests of bench/sender.py, with a client that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self, cast

import grpc
import pytest

from hotgraph_client import (
    AsyncClient,
    ChoiceFinish,
    Event,
    Finished,
    FinishReason,
    QueueFullError,
    Receipt,
    Started,
    Timings,
    Tokens,
    UnavailableError,
    Usage,
)
from hotgraph_server.bench.sample import Sample
from hotgraph_server.bench.sender import ClientSender, RequestOptions
from hotgraph_server.bench.workload import Work

from .virtual_time import VirtualClock, run_virtually

Step = float | Event | Exception
"""What a scripted stream does next: wait so many seconds, give an event, or fail."""

STARTED = Started("r", "m", 4, 1)
WORK = Work(0, (1, 2, 3, 4), 3, 11)


def tokens(*token_ids: int) -> Tokens:
    return Tokens(0, token_ids, "")


def finished(num_tokens: int) -> Finished:
    return Finished(
        (ChoiceFinish(0, FinishReason.LENGTH),),
        Usage(4, num_tokens, 2),
        Timings(0.1, 0.2, 0.3, 0.4, None, 0.6),
        Receipt(5, 4, 1, 0),
    )


class ScriptedStream:
    def __init__(self, script: list[Step]) -> None:
        self.script = script
        self.is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_closed = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        for step in self.script:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step


class ScriptedClient:
    """Gives the same stream to every call, and remembers the calls."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.streams: list[ScriptedStream] = []

    def generate(self, prompt: object, **options: object) -> ScriptedStream:
        self.calls.append((prompt, options))
        self.streams.append(ScriptedStream(self.script))
        return self.streams[-1]


def send(client: ScriptedClient, options: RequestOptions | None = None) -> Sample:
    sample = Sample(0, 0, 4, 3, scheduled=0.0)
    sender = ClientSender([cast(AsyncClient, client)], options or RequestOptions())
    run_virtually(lambda: sender.send(WORK, sample, VirtualClock()))
    return sample


def test_a_request_that_goes_well() -> None:
    """Each token has the time its event came, and the server's own view is kept."""
    client = ScriptedClient(0.5, STARTED, 0.5, tokens(7), 0.25, tokens(8, 9), 0.125, finished(3))
    sample = send(client, RequestOptions(keeps_tokens=True, timeout_seconds=9.0))
    assert sample.is_ok
    assert (sample.sent, sample.token_times, sample.end) == (0.0, [1.0, 1.25, 1.25], 1.375)
    assert (sample.token_ids, sample.num_events) == ([7, 8, 9], 2)
    assert sample.server is not None
    assert (sample.server.num_cached_prompt_tokens, sample.server.num_graph_steps) == (2, 4)
    assert sample.server.time_to_first_token_seconds == 0.4
    ((prompt, options),) = client.calls
    assert prompt == WORK.prompt
    assert options == {
        "temperature": 0.0,
        "seed": 11,
        "max_tokens": 3,
        "ignore_eos": True,
        "graph_policy": "prefer",
        "timeout": 9.0,
    }
    assert client.streams[0].is_closed


def test_tokens_are_not_kept_unasked() -> None:
    """Without the option a sample holds no token ids."""
    assert send(ScriptedClient(STARTED, tokens(7, 8, 9), finished(3))).token_ids == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([QueueFullError("full", reason="QUEUE_FULL")], "QUEUE_FULL"),
        ([UnavailableError("no daemon", code=grpc.StatusCode.UNAVAILABLE)], "UNAVAILABLE"),
        ([STARTED, tokens(7), UnavailableError("lost", code=grpc.StatusCode.UNAVAILABLE)], "UNAVAILABLE"),
        ([STARTED, tokens(7, 8, 9)], "STREAM_LOST"),
        ([STARTED, tokens(7, 8), finished(3)], "WRONG_LENGTH"),
        ([STARTED, tokens(7, 8), finished(2)], "WRONG_LENGTH"),
        ([STARTED, finished(0)], "WRONG_LENGTH"),
    ],
)
def test_failures(script: list[Step], reason: str) -> None:
    """A refusal, a lost server, a stream without its end and an answer of another length are failures, each with its
    reason and the time it ended."""
    sample = send(ScriptedClient(0.5, *script))
    assert sample.error == reason
    assert sample.error_message
    assert sample.end == 0.5


def test_short_answers_are_right_when_the_model_may_stop() -> None:
    """Without ignore_eos an answer may end before the asked length."""
    assert send(ScriptedClient(STARTED, tokens(7), finished(1)), RequestOptions(ignore_eos=False)).is_ok


def test_a_mistake_of_ours_is_no_failed_request() -> None:
    """An error that is none of a call's ends the run."""
    with pytest.raises(ZeroDivisionError):
        send(ScriptedClient(ZeroDivisionError()))


def test_clients_take_turns() -> None:
    """A closed loop's client keeps its connection; in an open loop the requests go round all of them."""
    for by_index, expected in ((False, [0, 0, 0, 0]), (True, [2, 1, 1, 0])):
        clients = [ScriptedClient(STARTED, tokens(7, 8, 9), finished(3)) for _ in range(4)]
        sender = ClientSender([cast(AsyncClient, client) for client in clients], RequestOptions(), by_index=by_index)

        async def run(sender: ClientSender = sender) -> None:
            for index in (0, 1, 2, 4):
                await sender.send(WORK, Sample(index, 3, 4, 3, 0.0), VirtualClock())

        run_virtually(run)
        counts = [len(client.calls) for client in clients]
        assert counts == (expected if by_index else [0, 0, 0, 4])
