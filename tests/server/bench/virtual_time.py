"""An event loop whose time jumps to the next timer whenever nothing else is to do, and a sender that follows a script."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from hotgraph_server.bench.clock import Clock
from hotgraph_server.bench.sample import Sample
from hotgraph_server.bench.workload import MEASURED_STREAM, Work

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: what would be a wait moves the loop's time on."""

    moment = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("every task waits and no timer is set: the test would hang")
        self.moment += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jumping = _JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.moment


class VirtualClock:
    """The loop's time as a clock of the bench."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep_until(self, moment: float) -> None:
        if moment > self.now():
            await asyncio.sleep(moment - self.now())


def run_virtually(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs it to its end in no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())


class NumberedWorkload:
    """Request i asks for three tokens after a prompt of one."""

    def work(self, index: int, stream: int = MEASURED_STREAM) -> Work:
        return Work(index, (index,), 3, index)


class ScriptedSender:
    """Serves every request in `service_seconds`, a third for each token, `num_servers` at a time; fails those it is told to."""

    def __init__(
        self, service_seconds: float, *, num_servers: int = 1 << 20, failing: frozenset[int] = frozenset()
    ) -> None:
        self.service_seconds = service_seconds
        self.places = asyncio.Semaphore(num_servers)
        self.failing = failing
        self.num_active = 0
        self.max_active = 0
        self.sent: list[tuple[int, float]] = []

    async def send(self, work: Work, sample: Sample, clock: Clock) -> None:
        sample.sent = clock.now()
        self.sent.append((work.index, sample.sent))
        self.num_active += 1
        self.max_active = max(self.max_active, self.num_active)
        async with self.places:
            for _ in range(work.max_tokens):
                await asyncio.sleep(self.service_seconds / work.max_tokens)
                sample.token_times.append(clock.now())
        if work.index in self.failing:
            sample.fail("QUEUE_FULL", f"request {work.index} is one too many")
        sample.end = clock.now()
        self.num_active -= 1
