"""Streams over the wire, for both clients: events, results, and every way to end them."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from hotgraph.v1 import inference_service_pb2
from hotgraph_client import (
    AsyncClient,
    CancelledRequestError,
    Client,
    DeadlineError,
    Event,
    Finished,
    FinishReason,
    HotgraphError,
    Started,
    Tokens,
)
from tests.client.drivers import Driver
from tests.client.scripted_model import SEED
from tests.client.scripted_server import (
    ScriptedServer,
    broken,
    error_info,
    fail,
    hang,
    retry_info,
    whole,
)

TEXT = "naïve 😀 end"


def text_of(events: list[Event], choice_index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Tokens) and e.choice_index == choice_index)


def ids_of(events: list[Event], choice_index: int = 0) -> list[int]:
    return [i for e in events if isinstance(e, Tokens) and e.choice_index == choice_index for i in e.token_ids]


async def test_events_come_in_order(server: ScriptedServer, driver: Driver) -> None:
    """A generation is Started, then Tokens whose texts join, then Finished."""
    server.play(whole(TEXT))
    events = await driver.events()
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, Tokens) for event in events[1:-1])
    assert text_of(events) == TEXT
    assert ids_of(events) == list(TEXT.encode())
    assert events[-1].choices[0].reason is FinishReason.LENGTH
    assert events[-1].usage.completion_tokens == len(TEXT.encode())
    assert events[-1].timings.total_seconds == 0.25


async def test_result_joins_all(server: ScriptedServer, driver: Driver) -> None:
    """result() gives text, ids, log-probabilities, seed, usage, timings and receipt of every choice."""
    server.play(whole("one", "two", size=2))
    completion = await driver.result(num_choices=2)
    assert [choice.text for choice in completion.choices] == ["one", "two"]
    assert completion.text == "one"
    assert completion.token_ids == tuple(b"one")
    assert [one.chosen.token_id for one in completion.choices[1].logprobs] == list(b"two")
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.seed == SEED
    assert completion.request_id == "made-by-server"
    assert completion.receipt.num_steps == 7
    assert completion.num_resumes == 0


async def test_text_grows_and_result_after_iteration(server: ScriptedServer, socket_path: Path) -> None:
    """text holds what came so far, and result() after some iteration includes the events already read."""
    server.play(whole("abc"))
    async with AsyncClient(f"unix:{socket_path}") as client:
        generation = client.generate("go on")
        seen = []
        async for event in generation:
            seen.append(generation.text)
            if isinstance(event, Tokens) and event.text == "b":
                break
        assert seen == ["", "a", "ab"]
        assert generation.started is not None
        assert (await generation.result()).text == "abc"
        assert (await generation.result()).text == "abc"


async def test_deadline(server: ScriptedServer, driver: Driver) -> None:
    """A stream past its timeout raises DeadlineError, and the server is told."""
    server.play(broken(hang, 2, "abc"))
    events, error = await driver.partial(seed=1, timeout=0.2)
    assert isinstance(error, DeadlineError)
    assert text_of(events) == "a"
    await server.until(lambda: server.num_active == 0)


async def test_breaking_off_cancels(server: ScriptedServer, kind: str, socket_path: Path) -> None:
    """Leaving the loop and dropping the stream ends the call on the server, by our doing: gRPC's call object is held here."""
    server.play(broken(hang, 3, "abc"))
    calls: list[Any] = []
    if kind == "async":
        async with AsyncClient(f"unix:{socket_path}") as client:
            generation = client.generate("go on")
            calls.append(generation._connection._call)
            async for event in generation:
                if isinstance(event, Tokens):
                    break
            del generation
            gc.collect()
            await server.until(lambda: server.num_cancelled == 1)
    else:

        def read(client: Client) -> None:
            generation = client.generate("go on")
            calls.append(generation._connection._call)
            for event in generation:
                if isinstance(event, Tokens):
                    break

        with Client(f"unix:{socket_path}") as blocking:
            await asyncio.to_thread(read, blocking)
            gc.collect()
            await server.until(lambda: server.num_cancelled == 1)


async def test_dropping_in_another_thread_cancels(server: ScriptedServer, socket_path: Path) -> None:
    """The garbage collector may run in any thread: an async stream that goes there is cancelled in its own loop."""
    server.play(broken(hang, 3, "abc"))
    async with AsyncClient(f"unix:{socket_path}") as client:
        streams = [client.generate("go on")]
        call = streams[0]._connection._call
        await anext(streams[0])
        await asyncio.to_thread(streams.clear)
        await server.until(lambda: server.num_cancelled == 1)
        del call


async def test_leaving_the_context_cancels(server: ScriptedServer, kind: str, socket_path: Path) -> None:
    """Leaving the stream's with block ends the call while the object is still held."""
    server.play(broken(hang, 3, "abc"))
    if kind == "async":
        async with AsyncClient(f"unix:{socket_path}") as client:
            async with client.generate("go on") as generation:
                await anext(generation)
            await server.until(lambda: server.num_cancelled == 1)
            await generation.close()
            with pytest.raises(CancelledRequestError):
                await anext(generation)
    else:
        with Client(f"unix:{socket_path}") as blocking:

            def read() -> Any:
                with blocking.generate("go on") as generation:
                    next(generation)
                return generation

            stream = await asyncio.to_thread(read)
            await server.until(lambda: server.num_cancelled == 1)
            with pytest.raises(CancelledRequestError):
                next(stream)


async def test_cancel_wakes_the_reader(server: ScriptedServer, kind: str, socket_path: Path) -> None:
    """cancel() from elsewhere ends the call, and the waiting reader gets CancelledRequestError."""
    server.play(broken(hang, 1, "abc"))
    if kind == "async":
        async with AsyncClient(f"unix:{socket_path}") as client:
            generation = client.generate("go on")
            reading = asyncio.ensure_future(generation.result())
            await server.until(lambda: server.num_active == 1)
            assert generation.cancel()
            assert not generation.cancel()
            with pytest.raises(CancelledRequestError):
                await reading
            await server.until(lambda: server.num_cancelled == 1)
    else:
        with Client(f"unix:{socket_path}") as blocking:
            stream = blocking.generate("go on")
            waiting = asyncio.ensure_future(asyncio.to_thread(stream.result))
            await server.until(lambda: server.num_active == 1)
            assert stream.cancel()
            with pytest.raises(CancelledRequestError):
                await waiting
            await server.until(lambda: server.num_cancelled == 1)


async def test_cancel_while_waiting_to_resume(server: ScriptedServer, kind: str, socket_path: Path) -> None:
    """cancel() ends the wait before the next connection too."""
    failed = fail(grpc.StatusCode.UNAVAILABLE, "failed", error_info("ENGINE_FAILED"), retry_info(60))
    server.play(broken(failed, 2, "abc"))
    async with asyncio.timeout(10):
        if kind == "async":
            async with AsyncClient(f"unix:{socket_path}") as client:
                generation = client.generate("go on", seed=1)
                reading = asyncio.ensure_future(generation.result())
                await server.until(lambda: len(server.requests) == 1 and server.num_active == 0)
                generation.cancel()
                with pytest.raises(CancelledRequestError):
                    await reading
        else:
            with Client(f"unix:{socket_path}") as blocking:
                stream = blocking.generate("go on", seed=1)
                waiting = asyncio.ensure_future(asyncio.to_thread(stream.result))
                await server.until(lambda: len(server.requests) == 1 and server.num_active == 0)
                stream.cancel()
                with pytest.raises(CancelledRequestError):
                    await waiting


async def test_a_cancelled_task_ends_the_call(server: ScriptedServer, socket_path: Path) -> None:
    """Cancelling the reading task cancels the call, and the task sees its own CancelledError."""
    server.play(broken(hang, 1, "abc"))
    async with AsyncClient(f"unix:{socket_path}") as client:
        reading = asyncio.create_task(client.generate("go on", seed=1).result())
        await server.until(lambda: server.num_active == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await server.until(lambda: server.num_cancelled == 1)
        assert len(server.requests) == 1


async def test_closing_the_client_ends_streams(server: ScriptedServer, kind: str, socket_path: Path) -> None:
    """Closing the client ends its streams with CancelledRequestError, and they do not go on."""
    server.play(broken(hang, 1, "abc"))
    if kind == "async":
        client = AsyncClient(f"unix:{socket_path}")
        reading = asyncio.create_task(client.generate("go on", seed=1).result())
        await server.until(lambda: server.num_active == 1)
        await client.close()
        with pytest.raises(CancelledRequestError):
            await reading
    else:
        blocking = Client(f"unix:{socket_path}")
        waiting = asyncio.ensure_future(asyncio.to_thread(blocking.generate("go on", seed=1).result))
        await server.until(lambda: server.num_active == 1)
        await asyncio.to_thread(blocking.close)
        with pytest.raises(CancelledRequestError):
            await waiting
    await server.until(lambda: server.num_active == 0)


async def test_closing_the_client_while_it_waits(server: ScriptedServer, kind: str, socket_path: Path) -> None:
    """Closing the client ends a stream that waits for its next connection at once."""
    failed = fail(grpc.StatusCode.UNAVAILABLE, "failed", error_info("ENGINE_FAILED"), retry_info(60))
    server.play(broken(failed, 2, "abc"))
    async with asyncio.timeout(10):
        if kind == "async":
            client = AsyncClient(f"unix:{socket_path}")
            reading = asyncio.create_task(client.generate("go on", seed=1).result())
            await server.until(lambda: len(server.requests) == 1 and server.num_active == 0)
            await client.close()
            with pytest.raises(CancelledRequestError):
                await reading
        else:
            blocking = Client(f"unix:{socket_path}")
            waiting = asyncio.ensure_future(asyncio.to_thread(blocking.generate("go on", seed=1).result))
            await server.until(lambda: len(server.requests) == 1 and server.num_active == 0)
            await asyncio.to_thread(blocking.close)
            with pytest.raises(CancelledRequestError):
                await waiting


def test_the_async_client_needs_a_loop() -> None:
    """Starting an async generation outside an event loop is a RuntimeError, not a call that nobody reads."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("unix:x").generate("go on")


async def test_an_interrupt_ends_the_call(server: ScriptedServer, socket_path: Path) -> None:
    """An exception that strikes inside a blocking read, such as KeyboardInterrupt, ends the generation for good."""
    server.play(broken(hang, 2, "abc"))
    with Client(f"unix:{socket_path}") as client:
        generation = client.generate("go on", seed=1)
        await asyncio.to_thread(next, generation)
        connection = generation._connection

        def interrupted(idle_seconds: float | None = None) -> Any:
            raise KeyboardInterrupt

        connection.read = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            next(generation)
        await server.until(lambda: server.num_cancelled == 1)
        with pytest.raises(CancelledRequestError):
            next(generation)


async def test_a_finished_stream_is_not_cancelled(server: ScriptedServer, driver: Driver) -> None:
    """A generation read to its end, or closed after Finished, does not look to the server as if the caller had left."""
    server.play(whole("abc"))
    await driver.events()
    await server.until(lambda: server.num_active == 0)
    assert server.num_cancelled == 0


@pytest.mark.parametrize("ending", ["read", "closed", "cancelled elsewhere", "dropped", "failed", "past its deadline"])
async def test_an_ended_call_leaves_nothing_with_grpc(server: ScriptedServer, socket_path: Path, ending: str) -> None:
    """However a blocking stream ends, gRPC is left no event of its call: it would hold the call for the channel's life."""
    acts = {"read": whole("abc"), "failed": broken(fail(grpc.StatusCode.INVALID_ARGUMENT), 2, "abc")}
    server.play(acts.get(ending, broken(hang, 2, "abc")))
    calls: list[Any] = []

    def run(client: Client) -> None:
        generation = client.generate("go on", seed=1, timeout=0.2 if ending == "past its deadline" else None)
        calls.append(generation._connection._call)
        if ending == "dropped":
            next(generation)
        elif ending == "closed":
            with generation:
                next(generation)
        elif ending == "cancelled elsewhere":
            next(generation)
            next(generation)
            later = threading.Timer(0.1, generation.cancel)
            later.start()
            with pytest.raises(CancelledRequestError):
                next(generation)
            later.join()
        elif ending == "read":
            generation.result()
        else:
            with pytest.raises(HotgraphError):
                generation.result()

    with Client(f"unix:{socket_path}") as client:
        await asyncio.to_thread(run, client)
        gc.collect()
        (call,) = calls
        assert type(call).__name__ == "_SingleThreadedRendezvous"  # what follows looks into this one
        assert call._state.due == set()
        server.play(whole("again"))
        assert (await asyncio.to_thread(client.generate("go on").result)).text == "again"


INTERRUPTED = """
import sys
from hotgraph_client import CancelledRequestError, Client
with Client(sys.argv[1]) as client:
    generation = client.generate("go on", seed=1)
    print(type(next(generation)).__name__, flush=True)
    try:
        next(generation)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    try:
        next(generation)
    except CancelledRequestError:
        print("over", flush=True)
    print(client.tokenize("a").token_ids)
"""


async def test_a_signal_in_a_blocking_read(server: ScriptedServer, socket_path: Path) -> None:
    """Ctrl-C while the blocking client waits ends the call, here and on the server; the client can be used further."""
    server.play(broken(hang, 1, "abc"))
    server.answers["Tokenize"] = inference_service_pb2.TokenizeResponse(token_ids=[7])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTED, f"unix:{socket_path}", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"Started\n"
        await asyncio.sleep(0.1)  # for it to be inside the read; before it the interrupt would hit Python code
        process.send_signal(signal.SIGINT)
        rest = await process.stdout.read()
        assert await process.wait() == 0
        await server.until(lambda: server.num_cancelled == 1)
    assert rest == b"interrupted\nover\n(7,)\n"
