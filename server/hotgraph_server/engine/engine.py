"""The engine on torch: a step from batch to tokens, on one forward thread, through the graph cache.

Above it stands asyncio, below it torch. It knows slots and blocks by number only; whose they are the scheduler knows.
"""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Awaitable
from pathlib import Path
from typing import Protocol

import torch

from graphcache import Backend, CacheSettings, Clock, EagerBackend, GraphCache, SystemClock
from hotgraph_server.batch import Batch, EngineInfo, Row, Sampler, StepKey, StepOutput
from hotgraph_server.config import Settings
from hotgraph_server.engine.buckets import Buckets
from hotgraph_server.engine.buffers import StepBuffers
from hotgraph_server.engine.failure import engine_failed
from hotgraph_server.engine.kv_cache import KvCache
from hotgraph_server.engine.program import StepProgram
from hotgraph_server.engine.replay import GraphChooser
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.engine.thread import ForwardThread
from hotgraph_server.errors import ModelLoadError, SettingsError
from hotgraph_server.models.interface import Model

log = logging.getLogger(__name__)


class ServedModel(Protocol):
    """A model in place, and its name. `models.LoadedModel` is one."""

    @property
    def model(self) -> Model: ...

    @property
    def model_id(self) -> str: ...


class TorchEngine:
    """Implements Engine for a loaded model.

    `run_ahead`: steps that may be submitted before the first of them is read, less one. `load_seconds`: what loading the
    model took, for `info`.
    """

    def __init__(
        self,
        loaded: ServedModel,
        settings: Settings,
        *,
        clock: Clock | None = None,
        backend: Backend | None = None,
        run_ahead: int = 0,
        load_seconds: float = 0.0,
    ) -> None:
        """Raises SettingsError when the padding asked for does not go with the backend."""
        self._loaded = loaded
        self._settings = settings
        self._clock: Clock = clock or SystemClock()
        self._backend: Backend = backend or EagerBackend()
        self._run_ahead = run_ahead
        self._load_seconds = load_seconds
        self._is_padded = _is_padded(settings, self._backend)
        scheduler = settings.scheduler
        self._buckets = Buckets(
            num_slots=scheduler.num_slots,
            max_step_tokens=scheduler.max_step_tokens,
            max_padding_ratio=settings.graphs.max_padding_ratio,
        )
        self._thread = ForwardThread()
        self._info: EngineInfo | None = None
        self._cache: GraphCache[StepKey] | None = None
        self._num_outstanding = 0
        self._is_started = False
        self._is_closed = False
        self._is_failed = False  # written by the forward thread

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine is not started"
        return self._info

    @property
    def graphs(self) -> GraphCache[StepKey]:
        assert self._cache is not None, "the engine is not started"
        return self._cache

    async def start(self) -> None:
        """Allocates everything with a name and runs a first step. Raises ModelLoadError."""
        assert not self._is_started, "start is called once"
        self._is_started = True
        self._thread.start()
        try:
            await self._thread.submit(self._allocate)
        except BaseException:
            await asyncio.to_thread(self._thread.close)
            raise

    def step(self, batch: Batch) -> Awaitable[StepOutput]:
        info = self.info
        assert not self._is_closed, "the engine is closed"
        assert len(batch.rows) <= info.num_slots, f"{len(batch.rows)} rows, {info.num_slots} slots"
        assert batch.num_tokens <= info.max_step_tokens, f"{batch.num_tokens} tokens, {info.max_step_tokens} a step"
        assert self._num_outstanding <= self._run_ahead, f"{self._num_outstanding} steps are outstanding already"
        self._num_outstanding += 1
        return self._thread.submit(lambda: self._run(batch), on_done=self._note_done)

    def bucket(self, num_tokens: int, num_rows: int, sampler: Sampler) -> StepKey | None:
        return self._buckets.key(num_tokens, num_rows, sampler)

    async def close(self) -> None:
        if not self._is_started:
            return
        if not self._is_closed:
            self._is_closed = True
            if self._info is not None:
                await self._thread.submit(lambda: None)  # behind all outstanding steps
        if self._cache is not None:
            # Before the forward thread: a verification under way waits for that one.
            await asyncio.to_thread(self._cache.close)
        await asyncio.to_thread(self._thread.close)

    def _note_done(self) -> None:
        self._num_outstanding -= 1

    # On the forward thread.

    def _allocate(self) -> None:
        start_seconds = self._clock.monotonic()
        settings, model = self._settings, self._loaded.model
        num_slots, max_step_tokens = settings.scheduler.num_slots, settings.scheduler.max_step_tokens
        device = model.device
        if settings.model.num_threads is not None:
            torch.set_num_threads(settings.model.num_threads)  # holds for the threads of this thread's own steps
        block_size = settings.kv_cache.block_size
        num_probe_blocks = -(-max_step_tokens // block_size) if self._backend.needs_verification else 0
        context_length = min(model.context_length, settings.model.max_context or model.context_length)
        try:
            kv_cache = KvCache(
                model.kv_layout,
                settings.kv_cache,
                dtype=model.dtype,
                device=device,
                num_probe_blocks=num_probe_blocks,
                max_blocks=num_slots * -(-context_length // block_size),
            )
            context_length = kv_cache.context_length(context_length)
            max_blocks = max(-(-context_length // block_size), num_probe_blocks)
            self._slots = SlotTables(
                num_slots=num_slots, max_blocks=max_blocks, vocabulary_size=model.vocabulary_size, device=device
            )
            self._buffers = StepBuffers(
                max_tokens=max_step_tokens, max_rows=num_slots, max_blocks=max_blocks, device=device
            )
        except (RuntimeError, MemoryError) as error:
            raise ModelLoadError(f"no memory for the engine's buffers: {error}") from error
        self._program = StepProgram(
            model,
            kv_cache,
            self._slots,
            self._buffers,
            self._thread,
            context_length=context_length,
            is_padded=self._is_padded,
        )
        cache: GraphCache[StepKey] = GraphCache(
            self._program,
            self._backend,
            CacheSettings(
                budget_bytes=settings.graphs.budget_bytes,
                policy=settings.graphs.policy,
                stall_budget_seconds=settings.graphs.stall_budget_seconds,
            ),
            clock=self._clock,
        )
        cache.set_kv_bytes(kv_cache.size_bytes)
        self._chooser = GraphChooser(cache, self._buckets, self._clock, is_padded=self._is_padded)
        self._warm_up()
        cache.start()
        self._cache = cache
        self._info = EngineInfo(
            model_id=self._loaded.model_id,
            architecture=model.architecture,
            runner=model.runner,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(device),
            device_name=device_name(device),
            num_parameters=model.num_parameters,
            weights_bytes=model.weights_bytes,
            load_seconds=self._load_seconds + self._clock.monotonic() - start_seconds,
            load_time=self._clock.time(),
            vocabulary_size=model.vocabulary_size,
            context_length=context_length,
            num_slots=num_slots,
            num_blocks=kv_cache.num_blocks,
            block_size=block_size,
            kv_cache_bytes=kv_cache.size_bytes,
            max_step_tokens=max_step_tokens,
            run_ahead=self._run_ahead,
        )

    def _warm_up(self) -> None:
        """One token in the scratch slot through every sampler: no request pays for libraries that set themselves up."""
        row = Row(self._slots.scratch_slot, 0, 1, [0], is_sampled=False)
        with torch.inference_mode():
            for sampler in Sampler:
                batch = Batch(step=0, rows=[row], sampler=sampler)
                self._buffers.fill(batch, 1, 1, self._slots)
                self._program.run(1, 1, sampler)

    def _run(self, batch: Batch) -> StepOutput:
        if self._is_failed:
            raise engine_failed()
        try:
            with torch.inference_mode():
                return self._run_step(batch)
        except Exception as error:
            self._is_failed = True
            log.exception("step %d failed: the engine is beyond use", batch.step)
            raise engine_failed() from error

    def _run_step(self, batch: Batch) -> StepOutput:
        start_seconds = self._clock.monotonic()
        self._slots.assign(batch.assignments)
        self._slots.append_blocks(batch.block_appends)
        choice = self._chooser.choose(batch)
        try:
            self._buffers.fill(batch, choice.tokens, choice.rows, self._slots)
            if choice.graph is not None:
                choice.graph.replay()
            else:
                self._program.run(choice.tokens, choice.rows, batch.sampler)
            token_ids, logprobs, failed_rows = self._buffers.read(batch)
        except BaseException:
            self._chooser.abandon(choice)
            raise
        receipt = self._chooser.finish(batch, choice, self._clock.monotonic() - start_seconds)
        return StepOutput(batch.step, token_ids, receipt, logprobs, failed_rows)


def _is_padded(settings: Settings, backend: Backend) -> bool:
    match settings.graphs.padding:
        case "always":
            return True
        case "never" if backend.is_fixed_shape:
            raise SettingsError(f"graphs.padding is never, but graphs of the {backend.name} backend have a fixed shape")
        case "never":
            return False
        case _:
            return backend.is_fixed_shape


def device_name(device: torch.device) -> str:
    """What people call the device: the processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
