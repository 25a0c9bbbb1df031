"""An engine and its scheduler in this process, and requests to them: what every benchmark here drives.

It uses what the daemon uses, and nothing of their insides.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.gpu.models import Loaded
from graphcache import CAPTURE_THREAD_NAME, Backend, GraphInfo, GraphState, Priority, SystemClock
from hotgraph_server.awake_cores import AwakeCores, choose_cores
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.config import GIB, GraphSettings, KvCacheSettings, SchedulerSettings, Settings
from hotgraph_server.engine import TorchEngine
from hotgraph_server.engine.kv_cache import block_bytes
from hotgraph_server.request import (
    FinishedEvent,
    GraphMode,
    GraphPolicy,
    Receipt,
    Request,
    SamplingParams,
    StopParams,
    TokensEvent,
)
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.threads import run_event_loop

T = TypeVar("T")

WARM_SECONDS = 120.0  # that graphs asked for may take; one that is not there then is a failed check
BLOCK_SIZE = 16
EAGER = GraphPolicy(GraphMode.EAGER_ONLY)
GREEDY = SamplingParams(temperature=0.0)


class NumberTokenizer:
    """Text for models that were never trained: a token reads as its number. Implements `text.Tokenizer`."""

    eos_token_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    chat_template = ""

    def __init__(self, vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes, each as a token."""
        return [byte % self.vocabulary_size for byte in text.encode()]

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        return self.encode("\n".join(content for _, content in messages))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)

    def piece(self, token_id: int) -> bytes:
        return f" {token_id}".encode()


@dataclass(slots=True)
class Completion:
    """What came of one request. Times are `time.perf_counter` seconds; a token has the time at which its reader had it.

    `receipt` is None for a request that was left before its end.
    """

    submit_seconds: float
    token_ids: list[int] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    receipt: Receipt | None = None

    @property
    def ttft_seconds(self) -> float:
        return self.token_seconds[0] - self.submit_seconds

    @property
    def is_all_graphs(self) -> bool:
        """Whether every step it took part in was a replay."""
        return self.receipt is not None and self.receipt.num_steps > 0 and self.receipt.num_eager_steps == 0


class Service:
    """A started engine with its scheduler. Made by `serving`."""

    def __init__(self, engine: TorchEngine, scheduler: Scheduler) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self._num_requests = 0

    def request(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        sampling: SamplingParams = GREEDY,
        policy: GraphPolicy | None = None,
    ) -> Request:
        """A request without text and without an early end. `policy`: PREFER when there is none."""
        self._num_requests += 1
        return Request(
            request_id=f"bench-{self._num_requests}",
            prompt_token_ids=tuple(prompt),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=StopParams(ignore_eos=True),
            omit_text=True,
            graph_policy=policy or GraphPolicy(),
        )

    async def complete(
        self,
        request: Request,
        *,
        max_events: int | None = None,
        completion: Completion | None = None,
    ) -> Completion:
        """Runs one request. With `max_events` it is left (which cancels it) after so many events.

        `completion` is filled in while it runs, for whoever watches. Raises what the stream raises.
        """
        found = completion or Completion(0.0)
        num_events = 0
        found.submit_seconds = time.perf_counter()
        async with self.scheduler.submit(request) as stream:
            async for event in stream:
                if isinstance(event, TokensEvent):
                    now = time.perf_counter()
                    found.token_ids += event.token_ids
                    found.token_seconds += [now] * len(event.token_ids)
                    num_events += 1
                    if num_events == max_events:
                        break
                elif isinstance(event, FinishedEvent):
                    found.receipt = event.receipt
        return found

    async def warm(self, keys: Iterable[StepKey | None]) -> list[GraphInfo[StepKey]]:
        """Has these graphs captured, a queue's worth at a time; returns how they stand at the end."""
        wanted = list(dict.fromkeys(key for key in keys if key is not None))
        cache = self.engine.graphs
        infos: list[GraphInfo[StepKey]] = []
        for start in range(0, len(wanted), 64):
            part = wanted[start : start + 64]
            for key in part:
                cache.request(key, Priority.OPERATOR)
            infos += await asyncio.to_thread(cache.wait, part, WARM_SECONDS)
        return infos

    async def settle(self) -> None:
        """Returns when no capture is pending: until then a measurement would meet captures it did not ask for."""
        async with asyncio.timeout(WARM_SECONDS):
            while self.engine.graphs.stats().num_pending:  # noqa: ASYNC110 the cache lives on another thread
                await asyncio.sleep(0.02)

    def prompt_key(self, num_tokens: int, sampler: Sampler = Sampler.GREEDY) -> StepKey | None:
        """The graph of a lone prompt of this length."""
        return self.engine.bucket(num_tokens, 1, sampler)

    def decode_key(self, num_rows: int, sampler: Sampler = Sampler.GREEDY) -> StepKey | None:
        """The graph of a decode step with so many rows."""
        return self.engine.bucket(num_rows, num_rows, sampler)

    def evict_all(self) -> int:
        """Throws every ready graph out, pinned or not; returns how many. To be called when no capture is pending."""
        ready = self.engine.graphs.list([GraphState.READY])
        for info in ready:
            if info.pin_expire_time is not None:
                self.engine.graphs.unpin(info.name)
            self.engine.graphs.evict(info.name)
        return len(ready)


def make_settings(
    loaded: Loaded,
    *,
    num_slots: int,
    kv_tokens: int,
    graphs: GraphSettings | None = None,
    prefix_caching: bool = False,
    max_step_tokens: int = 512,
) -> Settings:
    """Settings with room for `kv_tokens` tokens in all, so that the rest of the device is the benchmark's.

    Prefixes are not shared, unless asked for: a prompt is computed whenever it comes.
    """
    model = loaded.model
    num_blocks = -(-kv_tokens // BLOCK_SIZE) + num_slots + 2
    num_probe_blocks = -(-max_step_tokens // BLOCK_SIZE)  # the engine takes them off for its verifications
    size_bytes = (num_blocks + num_probe_blocks) * block_bytes(model.kv_layout, BLOCK_SIZE, model.dtype)
    return Settings(
        scheduler=SchedulerSettings(
            num_slots=num_slots, max_waiting=1024, max_step_tokens=max_step_tokens, prefix_caching=prefix_caching
        ),
        kv_cache=KvCacheSettings(size_bytes=size_bytes, block_size=BLOCK_SIZE),
        graphs=graphs or GraphSettings(budget_bytes=4 * GIB),
    )


@contextlib.asynccontextmanager
async def serving(
    loaded: Loaded, settings: Settings, *, run_ahead: int, backend: Backend | None = None
) -> AsyncIterator[Service]:
    """An engine with its scheduler, closed at the end. `backend`: None is the engine's own choice."""
    engine = TorchEngine(loaded, settings, backend=backend, run_ahead=run_ahead, load_seconds=loaded.load_seconds)
    await engine.start()
    scheduler = Scheduler(engine, NumberTokenizer(engine.info.vocabulary_size), settings.scheduler)
    await scheduler.start()
    # From here on as in the daemon, but that nothing lets the cores sleep.
    cores = AwakeCores(
        choose_cores(settings.server.awake_cores, gpu_address=engine.info.gpu_address),
        quiet_seconds=settings.server.awake_seconds,
        clock=SystemClock(),
        spares=[CAPTURE_THREAD_NAME],
    )
    cores.start()
    scheduler.on_submit = cores.touch
    gc.collect()
    gc.freeze()
    try:
        yield Service(engine, scheduler)
    finally:
        await scheduler.close()
        await engine.close()
        cores.close()
        gc.unfreeze()
        del engine, scheduler, cores
        if loaded.model.device.type == "cuda":
            torch.cuda.empty_cache()


def failures(infos: Iterable[GraphInfo[StepKey]]) -> str:
    """Which graphs are not ready and why; empty when all are."""
    return "; ".join(f"{info.name} {info.state.value} {info.failure}" for info in infos if info.state.value != "ready")


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs it as the daemon runs."""
    return run_event_loop(work())
