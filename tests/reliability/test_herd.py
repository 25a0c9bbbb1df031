"""Everybody at once: when the daemon has just begun to serve, and when it is back after a SIGKILL."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack

import grpc.aio
import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_client.channel import ChannelConfig
from tests.integration.harness import Caller
from tests.integration.processes import process
from tests.reliability.probe import probed
from tests.reliability.victims import is_free, program, settings


async def herd(num_callers: int, *, max_attempts: int, num_rounds: int = 2) -> tuple[Counter[str], list[float]]:
    """Callers with a connection each who wait for a server and call once it is there; the daemon is killed after each round.

    What became of the calls, and the seconds from serving to the last answer of each round. Of the queue's 2,000 places
    there are fewer than callers when they are many: some are told to come back."""
    codes: Counter[str] = Counter()
    steady_seconds = []
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        config = settings(folder, is_tcp=False, scheduler={"num_slots": 32, "max_waiting": num_callers // 2})
        address = config.server.listen[0]
        options = tuple(ChannelConfig(address, max_attempts=max_attempts).options())
        async with AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(Caller(address, options=options)) for _ in range(num_callers)]

            async def one(caller: Caller) -> None:
                request = CompleteRequest(text="herd", max_tokens=2)
                for attempt in range(
                    20
                ):  # the documented policy: gRPC's own tries, then the caller's, as long as it is told
                    try:
                        await caller.inference.Complete(request, wait_for_ready=True, timeout=30.0)
                    except grpc.aio.AioRpcError as error:
                        retryable = error.code().name in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
                        if not retryable or attempt == 19 or max_attempts == 1:
                            codes[error.code().name] += 1
                            return
                        await asyncio.sleep(0.1 * (attempt + 1))
                    else:
                        codes["OK"] += 1
                        return

            for _ in range(num_rounds):
                calls = [asyncio.create_task(one(caller)) for caller in callers]
                await asyncio.sleep(0.2)  # all of them wait when it comes
                async with process(config, program(step_seconds=0.002)) as running, Caller(address) as prober:
                    await running.logged("serving fake")
                    begin = time.monotonic()
                    async with probed(prober, calls=False, interval_seconds=0.05) as health:
                        await asyncio.gather(*calls)
                    steady_seconds.append(time.monotonic() - begin)
                    assert not health.failures
                    await is_free(prober)
                    running.process.kill()
                    await running.ended()
                    # All connections are broken now, and their callers know it.
    told = ", ".join(f"{seconds:.1f} s" for seconds in steady_seconds)
    print(f"{num_callers} callers at once: {dict(codes)}, all settled after {told}")
    return codes, steady_seconds


async def test_herd_is_served() -> None:
    """200 connections at the moment of serving, again after a SIGKILL: with the documented retries all are served."""
    codes, steady_seconds = await herd(200, max_attempts=4)
    assert codes == {"OK": 400}
    assert max(steady_seconds) < 10


@pytest.mark.soak
async def test_large_herd_is_served() -> None:
    """2,000 connections."""
    codes, steady_seconds = await herd(2000, max_attempts=4)
    assert codes == {"OK": 4000}
    assert max(steady_seconds) < 30


@pytest.mark.soak
async def test_herd_without_retries_is_not_all_served() -> None:
    """The control: who does not try again is refused where there is no room, and never with any other status."""
    codes, _ = await herd(2000, max_attempts=1, num_rounds=1)
    assert codes["OK"] < 2000
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
