"""How honest callers fare meanwhile: health asked steadily, streams read, and what they see as times in milliseconds."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
from grpc_health.v1 import health_pb2

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.integration.harness import Caller


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed; infinite when there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


@dataclass
class Health:
    """What probing saw. Times from when the probe was due, so that a late one counts as slow."""

    millis: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    call_millis: list[float] = field(default_factory=list)  # of short completions

    @property
    def p99(self) -> float:
        return percentile(self.millis, 0.99)

    def __str__(self) -> str:
        calls = f", calls p50 {percentile(self.call_millis, 0.5):.1f} p99 {percentile(self.call_millis, 0.99):.1f} ms"
        return (
            f"health p50 {percentile(self.millis, 0.5):.1f} p99 {self.p99:.1f} max {max(self.millis, default=0):.1f} ms"
            f" of {len(self.millis)}{calls if self.call_millis else ''}, failures {dict(self.failures)}"
        )


@asynccontextmanager
async def probed(caller: Caller, *, interval_seconds: float = 0.01, calls: bool = True) -> AsyncIterator[Health]:
    """Asks for health, and for a short completion, steadily and one after the other, until the context ends."""
    found = Health()

    async def ask_health() -> None:
        response = await caller.health.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            found.failures["NOT_SERVING"] += 1

    async def complete() -> None:
        await caller.inference.Complete(CompleteRequest(text="honest", max_tokens=3), timeout=5.0)

    async def steadily(ask: object, millis: list[float]) -> None:
        assert callable(ask)
        while True:
            begin = time.monotonic()
            try:
                await ask()
            except grpc.aio.AioRpcError as error:
                found.failures[error.code().name] += 1
            finally:  # one that is under way at the end counts, too
                millis.append((time.monotonic() - begin) * 1000)
            await asyncio.sleep(interval_seconds)

    tasks = [asyncio.create_task(steadily(ask_health, found.millis))]
    if calls:
        tasks.append(asyncio.create_task(steadily(complete, found.call_millis)))
    try:
        yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()


async def token_gaps(caller: Caller, num_tokens: int) -> list[float]:
    """Reads a stream of so many tokens; the times between its events, in milliseconds."""
    gaps = []
    last = 0.0
    async for event in caller.inference.Generate(GenerateRequest(text="steady", max_tokens=num_tokens)):
        now = time.monotonic()
        if event.WhichOneof("event") == "tokens":
            if last:
                gaps.append((now - last) * 1000)
            last = now
    return gaps
