"""Memory, files and threads of a daemon over many calls, of which half do not end well: nothing of them may stay.

What is measured is the slope of the second half: in the first one caches and pools fill.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.integration.harness import Caller
from tests.reliability.victims import Victim, is_free, victim

LIMIT_BYTES: Final = 150.0  # of one call; the gate of docs/reliability.md is less, and is missed
NUM_CALLERS: Final = 4
NUM_AT_ONCE: Final = 48

# The fake engine keeps all batches for tests to look at: here only the last. And it remembers what was written to each
# position of each block, a number of 36 B that would come with the position's first token: here all are there from the first.
FORGETFUL: Final = """
def forget():
    own_init, own_step = FakeEngine.__init__, FakeEngine.step

    def init(self, *rest, **named):
        own_init(self, *rest, **named)
        info = self.info
        self._checker._blocks.update(
            {block: [hash((block, position)) for position in range(info.block_size)] for block in range(1, info.num_blocks)}
        )

    def step(self, batch):
        self.batches.clear()
        return own_step(self, batch)

    FakeEngine.__init__, FakeEngine.step = init, step

forget()
"""
# Every call leaves something behind that nothing frees.
LEAK: Final = """
from hotgraph_server.scheduler import Scheduler
own_end = Scheduler._end
kept = []

def end(self, ticket, *rest):
    kept.append(bytearray(2000))
    own_end(self, ticket, *rest)

Scheduler._end = end
"""


@dataclass(frozen=True)
class Held:
    """What a daemon holds at one time."""

    resident_bytes: int
    num_files: int
    num_threads: int

    @classmethod
    def by(cls, daemon: Victim) -> Held:
        num_threads = len(list(Path(f"/proc/{daemon.process_id}/task").iterdir()))
        return cls(daemon.resident_bytes, daemon.num_files, num_threads)


async def one(caller: Caller, kind: int, chance: random.Random) -> str:
    """One call: half of them are whole answers, one stream or one message; a quarter is cancelled, a quarter is too late."""
    call: Any
    try:
        if kind == 0:
            await caller.inference.Complete(CompleteRequest(text="x" * chance.randint(1, 40), max_tokens=3))
        elif kind == 1:
            async for _ in caller.inference.Generate(GenerateRequest(text="y", max_tokens=3)):
                pass
        elif kind == 2:
            call = caller.inference.Generate(GenerateRequest(text="z", max_tokens=900))
            for _ in range(chance.randint(0, 2)):
                await call.read()
            call.cancel()
            return str((await call.code()).name)
        else:
            request = CompleteRequest(text="w", max_tokens=900)
            timeout = chance.uniform(0.002, 0.02)
            if chance.random() < 0.5:
                request.timeout.CopyFrom(Duration(nanos=int(timeout * 1e9)))
                await caller.inference.Complete(request)
            else:
                await caller.inference.Complete(request, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def slope(num_calls: int, *, more: str = "") -> float:
    """Bytes that the daemon has more for each call of the second half."""
    chance = random.Random(37)
    codes: Counter[str] = Counter()
    async with victim(step_seconds=0.001, more=FORGETFUL + more) as daemon, AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(daemon.address)) for _ in range(NUM_CALLERS)]
        for caller in callers:
            await caller.check_alive()
        kinds = iter([number % 4 for number in range(num_calls)])

        async def work(caller: Caller, until: int) -> None:
            while sum(codes.values()) < until and (kind := next(kinds, None)) is not None:
                codes[await one(caller, kind, chance)] += 1

        begin = time.monotonic()
        held = []
        for until in (num_calls // 2, num_calls):
            await asyncio.gather(*(work(callers[n % NUM_CALLERS], until) for n in range(NUM_AT_ONCE)))
            await is_free(callers[0])
            await asyncio.sleep(0.5)
            held.append(Held.by(daemon))
        seconds = time.monotonic() - begin
        await callers[0].check_alive()
    middle, last = held
    per_call = (last.resident_bytes - middle.resident_bytes) / (num_calls / 2)
    print(
        f"{num_calls} calls in {seconds:.0f} s, {dict(codes)}: {middle.resident_bytes / 2**20:.1f} MiB at half,"
        f" {last.resident_bytes / 2**20:.1f} MiB at the end, {per_call:.0f} B a call, files {middle.num_files} to"
        f" {last.num_files}, threads {middle.num_threads} to {last.num_threads}"
    )
    assert codes["CANCELLED"] >= num_calls / 5
    assert codes["DEADLINE_EXCEEDED"] >= num_calls / 5
    assert set(codes) == {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert last.num_files <= middle.num_files + 2
    assert last.num_threads <= middle.num_threads + 2
    return per_call


async def test_memory_of_many_calls() -> None:
    """4,000 mixed calls: a coarse look, as pages are few; what a leak of kilobytes would be is seen."""
    assert await slope(4_000) < 1000


async def test_a_leak_is_noticed() -> None:
    """The control: two kilobytes that each request leaves behind are seen by the same look."""
    assert await slope(4_000, more=LEAK) > 1000


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_memory_of_very_many_calls() -> None:
    """40,000 mixed calls: little more in the second half; the figure is printed."""
    assert await slope(40_000) < LIMIT_BYTES
