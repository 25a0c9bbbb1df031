"""The forward thread on an NVIDIA GPU: results are read when their work is over, whatever was launched since."""

from __future__ import annotations

import asyncio

import pytest
import torch

from hotgraph_server.engine.thread import Deferred, ForwardThread

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
SLEEP_CYCLES = 300_000


async def test_each_result_is_read_behind_its_own_work() -> None:
    """Two launches ahead of what is read, hundreds of times: events that come round again are never somebody else's."""
    thread = ForwardThread(CUDA)
    thread.start()
    ring = torch.zeros(4, dtype=torch.int64, pin_memory=True)

    def launch(number: int) -> Deferred[int]:
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        ring[number % 4 : number % 4 + 1].copy_(torch.full((1,), number, device=CUDA), non_blocking=True)
        return thread.after_launched(lambda: int(ring[number % 4]))

    try:
        waiting: list[asyncio.Future[int]] = []
        for number in range(300):
            waiting.append(thread.launch(lambda number=number: launch(number)))  # type: ignore[misc]
            if len(waiting) == 3:
                assert await waiting.pop(0) == number - 2
        assert await asyncio.gather(*waiting) == [298, 299]
        assert len(thread._events) <= 3
    finally:
        thread.close()
