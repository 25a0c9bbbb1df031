"""Callers that leave: cancelled at every point of a request's life, killed, cut off. What they held is counted afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc.aio
import pytest

from hotgraph.v1.generation_pb2 import GRAPH_MODE_WAIT_UP_TO, GraphPolicy
from hotgraph.v1.inference_service_pb2 import GenerateRequest
from hotgraph_server.engine import FakeEngine
from hotgraph_server.rpc import server
from hotgraph_server.scheduler.stream import RequestStream
from tests.integration.harness import Caller, Serving, eventually, letters, serving
from tests.reliability.attackers import GENERATE, attacker
from tests.reliability.wire import dial, wire

SETTLE_SECONDS = 0.5  # for sockets that were closed to be let go of
STEP_SECONDS: Final = 0.002
NUM_TOKENS: Final = 900  # 1.8 s of steps and more: a request that is not given up is seen to run on
FREE_SECONDS: Final = 1.0  # a generous time for two processes and a step; what is measured is in steps

# A way to bring one request to a point of its life, and to cancel it there.
Point = Callable[[Serving, random.Random], Awaitable[Any]]


def generate(served: Serving, **request: Any) -> Any:
    fields: dict[str, Any] = {"text": "x", "max_tokens": NUM_TOKENS} | request
    return served.inference.Generate(GenerateRequest(**fields))


async def on_arrival(served: Serving, chance: random.Random) -> Any:
    call = generate(served)
    await asyncio.sleep(chance.uniform(0, 0.002))
    return call


async def in_the_queue(served: Serving, chance: random.Random) -> Any:
    others = [generate(served) for _ in range(served.engine.info.num_slots)]
    await eventually(lambda: served.scheduler.status().num_running == len(others))
    call = generate(served)
    await eventually(lambda: served.scheduler.status().num_waiting == 1)
    for other in others:
        other.cancel()
    return call


async def in_the_prompt(served: Serving, chance: random.Random) -> Any:
    call = generate(served, text="y" * 600, max_tokens=100)  # three chunks
    await eventually(lambda: served.scheduler.status().num_running == 1)
    return call


async def waiting_for_a_graph(served: Serving, chance: random.Random) -> Any:
    policy = GraphPolicy(mode=GRAPH_MODE_WAIT_UP_TO)
    policy.max_wait.seconds = 30
    call = generate(served, graph_policy=policy, text="z" * chance.randint(1, 100))
    await asyncio.sleep(chance.uniform(0, 0.004))
    return call


async def in_a_step(served: Serving, chance: random.Random) -> Any:
    call = generate(served)
    await call.read()
    await asyncio.sleep(chance.uniform(0, STEP_SECONDS))
    return call


async def between_tokens(served: Serving, chance: random.Random) -> Any:
    call = generate(served)
    for _ in range(chance.randint(2, 20)):
        await call.read()
    return call


async def at_the_last_token(served: Serving, chance: random.Random) -> Any:
    call = generate(served, max_tokens=3)
    while not (event := await call.read()).tokens.HasField("finish"):
        assert event is not grpc.aio.EOF
    return call


async def after_the_end(served: Serving, chance: random.Random) -> Any:
    call = generate(served, max_tokens=3)
    while await call.read() is not grpc.aio.EOF:
        pass
    return call


POINTS: Final[list[Point]] = [
    on_arrival,
    in_the_queue,
    in_the_prompt,
    waiting_for_a_graph,
    in_a_step,
    between_tokens,
    at_the_last_token,
    after_the_end,
]


async def race(point: Point, num_races: int, *, free_seconds: float = FREE_SECONDS) -> None:
    """Cancels requests there: each ends once, its place is free a step later, and the counts of begun and ended agree."""
    chance = random.Random(point.__name__)
    async with serving(engine=FakeEngine(rule=letters, step_seconds=STEP_SECONDS)) as served:
        for _ in range(num_races):
            call = await point(served, chance)
            call.cancel()
            # Not asked over the wire: how many steps pass must not depend on a call's way.
            await eventually(lambda: len(served.scheduler._tickets) == 0 or None, free_seconds)
            num_batches = len(served.engine.batches)
            await eventually(
                lambda: not served.scheduler.status().num_running and not served.scheduler.status().num_waiting,
                free_seconds,
            )
            assert len(served.engine.batches) - num_batches <= 1, "it ran on after its end"
            with contextlib.suppress(asyncio.CancelledError):
                code = await asyncio.wait_for(call.code(), 5)
                assert code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)
        await eventually(served.is_all_free)
        counts = (await served.status()).scheduler
        ended = counts.num_finished + counts.num_cancelled + counts.num_failed
        assert counts.num_requests == ended
        await served.check_alive()


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
async def test_cancel_races(point: Point) -> None:
    """However far a request is when its caller cancels, nothing of it stays, and it ends exactly once."""
    await race(point, 25)


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
async def test_many_cancel_races(point: Point) -> None:
    """The same, a thousand times at each point."""
    await race(point, 1000)


def forget_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the defence away: a stream that is closed does not end its request."""
    monkeypatch.setattr(RequestStream, "close", lambda self: None)


async def test_cancel_races_notice_a_request_that_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where closing a stream leaves its request alone, the races fail."""
    forget_to_cancel(monkeypatch)
    with pytest.raises(AssertionError, match="in time"):
        await race(between_tokens, 1)


def held() -> tuple[int, int]:
    """Tasks and open files of this process."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


async def killed(num_clients: int, num_streams: int, num_rounds: int, patience_seconds: float) -> list[float]:
    """Kills client processes in the middle of their streams; the seconds until the daemon held nothing of them."""
    times = []
    chance = random.Random(7)
    async with serving(
        engine=FakeEngine(rule=letters, step_seconds=STEP_SECONDS, num_slots=32, num_blocks=2049),
        scheduler={"num_slots": 32, "max_waiting": 1000},
        server={"listen": ("127.0.0.1:0",)},
    ) as served:
        await served.check_alive()
        before = held()
        for index in range(1 + num_rounds):
            if index == 1:  # gRPC opens what it keeps for itself when it first needs it
                await eventually(served.is_all_free)
                await asyncio.sleep(SETTLE_SECONDS)
                before = held()
            async with contextlib.AsyncExitStack() as stack:
                arguments = ("streams", served.daemon.addresses[0], num_streams)
                clients = [await stack.enter_async_context(attacker(*arguments)) for _ in range(num_clients)]
                for client in clients:
                    assert client.stdout is not None
                    assert await asyncio.wait_for(client.stdout.readline(), 20) == b"reading\n"
                assert served.scheduler.num_requests >= num_clients * num_streams // 2, "too few to mean anything"
                await asyncio.sleep(chance.uniform(0, 0.02))
                for client in clients:
                    client.kill()
                begin = time.monotonic()
                await eventually(lambda: not served.scheduler.num_requests, patience_seconds)
                await eventually(lambda: not served.scheduler.status().num_running, patience_seconds)
                times.append(time.monotonic() - begin)
        await eventually(served.is_all_free)
        await eventually(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
        await served.check_alive()
    return times


async def test_killed_clients_leave_nothing() -> None:
    """80 streams of two clients that are killed with SIGKILL: all free soon after, no task or file left."""
    times = await killed(2, 40, 2, 2.0)
    print("free after", [f"{1000 * seconds:.0f} ms" for seconds in times])
    assert max(times) < 0.5


@pytest.mark.soak
async def test_killed_clients_leave_nothing_many_times() -> None:
    """200 streams of four clients, 50 rounds."""
    times = sorted(await killed(4, 50, 50, 5.0))
    print(f"free after p50 {1000 * times[25]:.0f} ms, max {1000 * times[-1]:.0f} ms")
    assert times[-1] < 1.0


async def test_killed_clients_are_noticed_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where closing a stream leaves its request alone, what killed clients held is not free in time."""
    forget_to_cancel(monkeypatch)
    with pytest.raises(AssertionError, match="in time"):
        await killed(1, 20, 1, 0.3)


@asynccontextmanager
async def black_hole(address: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A relay to the daemon. Once the event is set it forwards nothing, and closes nothing: no FIN, no RST."""
    is_dark = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if is_dark.is_set():
                    await asyncio.Event().wait()
                writer.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_daemon, of_daemon = (lambda pair: (pair[1], pair[0]))(await dial(address))
        writers.extend((writer, to_daemon))
        for source, sink in ((reader, to_daemon), (of_daemon, writer)):
            tasks.add(asyncio.create_task(pump(source, sink)))

    listener = await asyncio.start_server(relay, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    try:
        yield f"{host}:{port}", is_dark
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.close()


async def vanish(patience_seconds: float) -> float:
    """Eight streams whose network is gone from one moment to the next, with 18 s of tokens ahead; the seconds until nothing is
    held for them."""
    async with (
        serving(engine=FakeEngine(rule=letters, step_seconds=0.02), server={"listen": ("127.0.0.1:0",)}) as served,
        black_hole(served.daemon.addresses[0]) as (relayed, is_dark),
        Caller(relayed) as caller,
    ):
        calls = [caller.inference.Generate(GenerateRequest(text="x", max_tokens=900)) for _ in range(8)]
        for call in calls:
            await call.read()
            await call.read()
        assert served.scheduler.num_requests == 8
        is_dark.set()
        begin = time.monotonic()
        await eventually(lambda: not served.scheduler.num_requests, patience_seconds)
        await eventually(served.is_all_free)
        seconds = time.monotonic() - begin
        for call in calls:
            call.cancel()
        return seconds


async def test_vanished_clients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After keepalive time and ping timeout, here 1.5 s, and one second more, nothing is held for who has vanished."""
    for name, value in (("KEEPALIVE_TIME_MS", 1000), ("KEEPALIVE_TIMEOUT_MS", 500), ("PING_TIMEOUT_MS", 500)):
        monkeypatch.setattr(server, name, value)
    seconds = await vanish(10)
    print(f"free after {seconds:.2f} s")
    assert seconds < 2.5


@pytest.mark.soak
async def test_vanished_clients_are_noticed_with_the_defaults() -> None:
    """With what the daemon has by itself, 15 s and one more; tokens for that long are ahead."""
    assert await vanish(20) < 16


@pytest.mark.soak
async def test_vanished_clients_stay_without_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without keepalive they hold their places for longer than that."""
    monkeypatch.setattr(server, "KEEPALIVE_TIME_MS", 2**31 - 1)
    with pytest.raises(AssertionError, match="in time"):
        await vanish(3)


async def idle_writes(num_readers: int, window_bytes: int, patience_seconds: float) -> None:
    """Callers that read nothing at all; raises when something is held for them after so long."""
    async with (
        serving(engine=FakeEngine(rule=letters, step_seconds=0.001), server={"listen": ("127.0.0.1:0",)}) as served,
        wire(served.daemon.addresses[0], reads=False, window_bytes=window_bytes) as connection,
    ):
        message = GenerateRequest(text="x", max_tokens=1000).SerializeToString()
        for _ in range(num_readers):
            connection.call(GENERATE, message)
        await eventually(lambda: served.daemon._rpc._calls.count == num_readers)
        await eventually(lambda: not served.daemon._rpc._calls.count or None, patience_seconds)
        await served.check_alive()


async def test_who_never_reads_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose window stays closed is cut off when the time for one write is over, here 0.5 s."""
    monkeypatch.setattr("hotgraph_server.rpc.inference.WRITE_SECONDS", 0.5)
    await idle_writes(8, 0, 4)


@pytest.mark.soak
async def test_who_never_reads_stays_without_that_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without it the calls are there until their deadline."""
    monkeypatch.setattr("hotgraph_server.rpc.inference.WRITE_SECONDS", 3600)
    with pytest.raises(AssertionError, match="in time"):
        await idle_writes(8, 0, 4)
