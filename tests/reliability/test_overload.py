"""More work than the daemon can do: what it still serves, how it refuses the rest, and who gets what.

Load comes open loop: requests are sent when they are due, however late the answers to others are.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.integration.harness import Caller, wire_error
from tests.reliability.probe import percentile, probed
from tests.reliability.victims import is_free, victim

NUM_SLOTS: Final = 8
STEP_SECONDS: Final = 0.02
NUM_TOKENS: Final = 20
CAPACITY: Final = NUM_SLOTS / (
    NUM_TOKENS * STEP_SECONDS
)  # requests a second, at most: a step takes longer than it sleeps
SECTIONS: Final = {"scheduler": {"num_slots": NUM_SLOTS, "max_waiting": 16}}
TAIL_SECONDS: Final = 3.0  # for what waits at the end of the load


@dataclass
class Load:
    """What became of the requests of one rate."""

    num_sent: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    served_times: list[float] = field(default_factory=list)
    shed_millis: list[float] = field(default_factory=list)
    num_without_a_hint: int = 0  # refusals that do not tell when to come back, in both ways
    seconds: float = 0.0

    @property
    def goodput(self) -> float:
        """Requests served a second, while the load lasted."""
        return len(self.served_times) / self.seconds

    def __str__(self) -> str:
        shed = f", shed p50 {percentile(self.shed_millis, 0.5):.1f} p99 {percentile(self.shed_millis, 0.99):.1f} ms"
        return (
            f"{self.num_sent} sent, {self.goodput:.1f}/s served{shed if self.shed_millis else ''}, {dict(self.codes)}"
        )


async def offer(callers: list[Caller], per_second: float, seconds: float) -> Load:
    """Sends at this rate for so long, and waits for every answer."""
    load = Load(seconds=seconds)
    begin = time.monotonic()
    tasks = set()

    async def one(caller: Caller) -> None:
        sent = time.monotonic()
        try:
            await caller.inference.Complete(CompleteRequest(text="work", max_tokens=NUM_TOKENS), timeout=30.0)
        except grpc.aio.AioRpcError as error:
            load.codes[error.code().name] += 1
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                load.shed_millis.append((time.monotonic() - sent) * 1000)
                refusal = wire_error(error)
                load.num_without_a_hint += not (refusal.retry_seconds and refusal.pushback_ms)
        else:
            load.codes["OK"] += 1
            if time.monotonic() - begin <= seconds:
                load.served_times.append(time.monotonic())

    while (now := time.monotonic() - begin) < seconds:
        while load.num_sent < now * per_second:
            tasks.add(asyncio.create_task(one(callers[load.num_sent % len(callers)])))
            load.num_sent += 1
        await asyncio.sleep(0.005)
    await asyncio.wait(tasks)
    for task in tasks:
        task.result()
    return load


async def overload(seconds: float, factors: tuple[float, ...], **sections: Any) -> dict[float, Load]:
    """The load at multiples of the capacity, one after the other, on one daemon."""
    found = {}
    async with AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(victim(step_seconds=STEP_SECONDS, sections=SECTIONS | sections))
        callers = [await stack.enter_async_context(Caller(daemon.address)) for _ in range(8)]
        prober = await stack.enter_async_context(Caller(daemon.address))
        for caller in (*callers, prober):
            await caller.check_alive()
        for factor in factors:
            async with probed(prober, calls=False, interval_seconds=0.02) as health:
                load = found[factor] = await offer(callers, factor * CAPACITY, seconds)
            print(f"{factor:g}x: {load}; {health}")
            assert load.num_sent >= 0.9 * factor * CAPACITY * seconds, "too few to mean anything"
            assert not health.failures
            await is_free(prober)
        await prober.check_alive()
    return found


async def check_overload(seconds: float, factors: tuple[float, ...], least_goodput: float, shed_millis: float) -> None:
    found = await overload(seconds, factors)
    for load in found.values():
        assert set(load.codes) <= {"OK", "RESOURCE_EXHAUSTED"}
        assert load.num_without_a_hint == 0
    most = max(load.goodput for load in found.values())
    worst = found[factors[-1]]
    assert worst.goodput >= least_goodput * most
    assert percentile(worst.shed_millis, 0.99) < shed_millis


async def test_overload_is_shed() -> None:
    """At 20 times the capacity as much is served as at twice; the rest is told at once when to come back."""
    await check_overload(2.0, (2, 20), 0.85, 500)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_overload_is_shed_for_long() -> None:
    """1, 2, 5 and 20 times the capacity, 30 s each."""
    await check_overload(30.0, (1, 2, 5, 20), 0.95, 100)


@pytest.mark.soak
async def test_overload_without_a_bound_is_not_shed() -> None:
    """The control: where everything may wait, nothing is refused, and few of them are served in time."""
    found = await overload(0.5, (5,), scheduler={"num_slots": NUM_SLOTS, "max_waiting": 100_000})
    assert not found[5].shed_millis


async def first_token_millis(caller: Caller, client_id: str) -> tuple[float, float]:
    """From the call to the first token of a short request, and how much of it the daemon says that it waited for a slot."""
    begin = time.monotonic()
    call: Any = caller.inference.Generate(
        GenerateRequest(text="modest", max_tokens=4), metadata=(("x-client-id", client_id),), timeout=60.0
    )
    first = 0.0
    async for event in call:
        if event.WhichOneof("event") == "tokens" and not first:
            first = (time.monotonic() - begin) * 1000
    return first, event.finished.timings.queue.ToTimedelta().total_seconds() * 1000


async def fairness(
    num_greedy: int,
    num_modest: int,
    seconds: float,
    *,
    fair_preemption: bool = False,
    num_tokens: int = 20,
    **changes: Any,
) -> tuple[list[float], list[float], int]:
    """One caller that keeps so many requests in flight, and modest ones with one at a time: the modest ones' times to the
    first token beside it and for a slot alone, in milliseconds, and how many of the greedy one's were served."""
    sections = {"scheduler": {"num_slots": NUM_SLOTS, "max_waiting": 600, "fair_preemption": fair_preemption}}
    async with victim(step_seconds=0.005, sections=sections, **changes) as daemon, AsyncExitStack() as stack:
        greedy = await stack.enter_async_context(Caller(daemon.address))
        modest = [await stack.enter_async_context(Caller(daemon.address)) for _ in range(num_modest)]
        for caller in (greedy, *modest):
            await caller.check_alive()
        is_over = asyncio.Event()
        num_served = 0

        async def take_all() -> None:
            nonlocal num_served
            while not is_over.is_set():
                await greedy.inference.Complete(
                    CompleteRequest(text="greedy", max_tokens=num_tokens), metadata=(("x-client-id", "greedy"),)
                )
                num_served += 1

        async def now_and_then(number: int) -> list[tuple[float, float]]:
            times = []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                times.append(await first_token_millis(modest[number], f"modest-{number}"))
                await asyncio.sleep(0.5)
            return times

        async def all_modest() -> tuple[list[float], list[float]]:
            found = [t for times in await asyncio.gather(*map(now_and_then, range(num_modest))) for t in times]
            return [first for first, _ in found], [queued for _, queued in found]

        alone, _ = await all_modest()
        tasks = [asyncio.create_task(take_all()) for _ in range(num_greedy)]
        await asyncio.sleep(0.5)
        beside, queued = await all_modest()
        is_over.set()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        print(
            f"first token p99: {percentile(alone, 0.99):.0f} ms alone, {percentile(beside, 0.99):.0f} ms beside a caller"
            f" with {num_greedy} in flight, of whose {num_served} were served; for a slot p50"
            f" {percentile(queued, 0.5):.0f} p90 {percentile(queued, 0.9):.0f} ms"
        )
        return beside, queued, num_served


async def test_a_greedy_caller_does_not_starve_others() -> None:
    """Whoever waits longest among the callers with the least running comes next, however much one caller has queued."""
    beside, _, num_served = await fairness(200, 10, 1.5)
    assert len(beside) >= 10
    assert num_served >= 30, "the greedy caller was to load the daemon"
    assert percentile(beside, 0.99) < 500


async def test_who_runs_nothing_need_not_wait_for_a_slot() -> None:
    """With fair_preemption a modest caller waits for a slot far shorter, and the greedy one is served nearly as much."""
    _, waited, num_served_else = await fairness(200, 10, 1.5, num_tokens=60)
    beside, queued, num_served = await fairness(200, 10, 1.5, num_tokens=60, fair_preemption=True)
    assert len(beside) >= 10
    assert percentile(queued, 0.75) < percentile(waited, 0.75) / 2
    assert num_served > num_served_else / 2


@pytest.mark.soak
async def test_a_plain_queue_starves_others() -> None:
    """The control: first come, first served lets a modest caller wait behind all that a greedy one has queued."""
    more = "from hotgraph_server.rpc.clients import Client\nClient.identity = 'everyone'  # one queue for all"
    beside, _, _ = await fairness(200, 10, 1.0, more=more)
    assert percentile(beside, 0.99) > 500
