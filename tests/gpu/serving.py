"""Serves requests on an engine in this process, and compares completions by what the model itself thinks of their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import torch

from graphcache import Backend, GraphState
from hotgraph_server.config import GraphSettings, KvCacheSettings, SchedulerSettings, Settings
from hotgraph_server.engine import TorchEngine
from hotgraph_server.models.interface import Model
from hotgraph_server.request import FinishedEvent, GraphMode, GraphPolicy, Receipt, Request, TokensEvent
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.text import ByteTokenizer
from tests.server.models.driver import Driver

CHUNK_TOKENS = 512
TIES = {torch.float32: 2e-3, torch.float16: 4e-2, torch.bfloat16: 3e-1}
"""How far the logits of two tokens may lie apart, where logits are about 1 in size, for rounding to choose between them."""


@dataclass
class Loaded:
    """A model in place: what TorchEngine is given."""

    model: Model
    model_id: str = "random"


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    receipt: Receipt


@dataclass
class Service:
    """A started engine and scheduler."""

    engine: TorchEngine
    scheduler: Scheduler

    async def complete(self, request: Request) -> Completion:
        """All tokens of a request."""
        ids: list[int] = []
        async with self.scheduler.submit(request) as stream:
            async for event in stream:
                if isinstance(event, TokensEvent):
                    ids += event.token_ids
                elif isinstance(event, FinishedEvent):
                    return Completion(ids, event.receipt)
        raise AssertionError("a stream ended without its last event")

    async def complete_all(self, requests: Sequence[Request], *, at_once: int) -> list[Completion]:
        """All requests, `at_once` of them in flight."""
        gate = asyncio.Semaphore(at_once)

        async def one(request: Request) -> Completion:
            async with gate:
                return await self.complete(request)

        return list(await asyncio.gather(*map(one, requests)))

    async def settle(self, timeout_seconds: float = 60.0) -> None:
        """Waits until no capture is pending."""
        graphs = self.engine.graphs
        keys = [info.key for info in graphs.list([GraphState.QUEUED, GraphState.CAPTURING])]
        await asyncio.to_thread(graphs.wait, keys, timeout_seconds)


def settings_of(*, num_slots: int = 64, graphs: GraphSettings | None = None, prefix_caching: bool = False) -> Settings:
    """Steps of up to 512 tokens, and 1 GiB of KV cache."""
    return Settings(
        scheduler=SchedulerSettings(num_slots=num_slots, max_step_tokens=512, prefix_caching=prefix_caching),
        kv_cache=KvCacheSettings(size_bytes=1 << 30),
        graphs=graphs or GraphSettings(),
    )


@asynccontextmanager
async def service(
    model: Model,
    *,
    num_slots: int = 64,
    graphs: GraphSettings | None = None,
    backend: Backend | None = None,
    run_ahead: int | None = None,
    prefix_caching: bool = False,
) -> AsyncIterator[Service]:
    """An engine and a scheduler with the settings of `settings_of`."""
    settings = settings_of(num_slots=num_slots, graphs=graphs, prefix_caching=prefix_caching)
    engine = TorchEngine(Loaded(model), settings, backend=backend, run_ahead=run_ahead)
    await engine.start()
    scheduler = Scheduler(engine, ByteTokenizer(), settings.scheduler)
    await scheduler.start()
    try:
        yield Service(engine, scheduler)
    finally:
        await scheduler.close()
        await engine.close()


def eager(request: Request) -> Request:
    """The same request, without any graph."""
    return replace(request, graph_policy=GraphPolicy(GraphMode.EAGER_ONLY))


def same_or_tied(
    model: Model, request: Request, found: Sequence[int], expected: Sequence[int], *, tie: float | None = None
) -> bool:
    """Whether two greedy completions are equal, or part at a token where the model can hardly tell the two apart.

    Batches of other sizes use other matrix kernels, which round differently; from there on the texts differ. `tie`: how far
    apart the logits of two such tokens may be; None is right for logits of about 1.
    """
    assert len(found) == len(expected)
    if list(found) == list(expected):
        return True
    parting = next(index for index, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    text = [*request.prompt_token_ids, *expected[:parting]]
    driver = Driver(model, num_blocks=len(text) // 16 + 3)
    for start in range(0, len(text), CHUNK_TOKENS):
        logits = driver.step({"a": text[start : start + CHUNK_TOKENS]})["a"]
    gap = (logits[found[parting]] - logits[expected[parting]]).abs().item()
    return gap <= (TIES[model.dtype] if tie is None else tie)
