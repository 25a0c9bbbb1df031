"""The two loops that make load: closed (N clients, each waits for its answer) and open (arrivals by a schedule).

It knows a sender that sends one request and fills in its sample, and no gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from hotgraph_server.bench.clock import Clock
from hotgraph_server.bench.sample import Sample
from hotgraph_server.bench.workload import MEASURED_STREAM, Work, Workload

_TURN = 64  # when late by many arrivals, sleep_until returns at once: after so many, the answers get their turn


class Sender(Protocol):
    """Sends one request at a time or many at once, and tells in the sample how it went."""

    async def send(self, work: Work, sample: Sample, clock: Clock) -> None:
        """Fills in sent, token_times, end and error. Raises nothing for a request that failed."""
        ...


@dataclass(frozen=True, slots=True)
class Limit:
    """When a loop stops sending: after so many requests, or after so many seconds. What is under way is finished.

    Raises ValueError unless at least one is given.
    """

    num_requests: int | None = None
    duration_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.num_requests is None and self.duration_seconds is None:
            raise ValueError("a run needs a number of requests or a duration")

    def is_reached(self, index: int, moment: float) -> bool:
        """Whether request `index`, to be sent at `moment`, is one too many."""
        if self.num_requests is not None and index >= self.num_requests:
            return True
        return self.duration_seconds is not None and moment >= self.duration_seconds


Report = Callable[[Sample], None]


async def closed_loop(
    sender: Sender,
    workload: Workload,
    clock: Clock,
    limit: Limit,
    *,
    num_clients: int,
    gap_seconds: float = 0.0,
    stream: int = MEASURED_STREAM,
    report: Report = lambda _: None,
) -> list[Sample]:
    """`num_clients` clients, each sending its next request `gap_seconds` after its last one ended.

    Samples come back by index; `report` is called as each ends. A request is scheduled when its client is ready.
    """
    samples: list[Sample] = []

    async def client(number: int) -> None:
        while not limit.is_reached(len(samples), clock.now()):
            work = workload.work(len(samples), stream)
            sample = Sample(work.index, number, work.num_prompt_tokens, work.max_tokens, clock.now())
            samples.append(sample)
            await sender.send(work, sample, clock)
            report(sample)
            if gap_seconds > 0:
                await clock.sleep_until(clock.now() + gap_seconds)

    async with asyncio.TaskGroup() as group:
        for number in range(num_clients):
            group.create_task(client(number))
    return samples


async def open_loop(
    sender: Sender,
    workload: Workload,
    clock: Clock,
    limit: Limit,
    arrivals: Iterator[float],
    *,
    stream: int = MEASURED_STREAM,
    report: Report = lambda _: None,
) -> list[Sample]:
    """A request at each of `arrivals`, whether or not earlier ones have ended. Latency counts from the arrival.

    Should the generator be late, the requests that are due go out at once and keep their moments: `Sample.lag` tells.
    """
    samples: list[Sample] = []

    async def send(work: Work, sample: Sample) -> None:
        await sender.send(work, sample, clock)
        report(sample)

    async with asyncio.TaskGroup() as group:
        for index, moment in enumerate(arrivals):
            if limit.is_reached(index, moment):
                break
            work = workload.work(index, stream)
            await clock.sleep_until(moment)
            sample = Sample(work.index, 0, work.num_prompt_tokens, work.max_tokens, moment)
            samples.append(sample)
            group.create_task(send(work, sample))
            if len(samples) % _TURN == 0:
                await asyncio.sleep(0)
    return samples
