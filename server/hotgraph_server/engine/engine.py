"""The engine on torch: a step from batch to tokens, on one forward thread, through the graph cache.

Above it stands asyncio, below it torch. It knows slots and blocks by number only; whose they are the scheduler knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Protocol

import torch

from graphcache import (
    Backend,
    CacheSettings,
    Clock,
    EagerBackend,
    Event,
    EventType,
    Graph,
    GraphCache,
    GraphStateError,
    Priority,
    SystemClock,
    UnknownGraphError,
)
from hotgraph_server.batch import Batch, EngineInfo, Row, Sampler, StepKey, StepOutput
from hotgraph_server.config import Settings
from hotgraph_server.engine.buckets import Buckets
from hotgraph_server.engine.failure import engine_failed
from hotgraph_server.engine.kv_cache import KvCache
from hotgraph_server.engine.probe import PREFIX_TOKENS, ProbeLayout
from hotgraph_server.engine.program import StepProgram
from hotgraph_server.engine.replay import Choice, GraphChooser
from hotgraph_server.engine.state import StepState
from hotgraph_server.engine.thread import Deferred, ForwardThread
from hotgraph_server.errors import EngineFailedError, ModelLoadError, SettingsError
from hotgraph_server.models.interface import Model
from hotgraph_server.request import TokenLogprobs
from hotgraph_server.threads import in_daemon_thread

log = logging.getLogger(__name__)

CORE_DECODE_ROWS = (1, 2, 4, 8)
CORE_PREFILL_TOKENS = (32, 64, 128)
CORE_SAMPLERS = (Sampler.GREEDY, Sampler.GUMBEL)
CORE_PIN_SECONDS = 1e9  # for good
RESERVED_BYTES = 3 << 29
"""Of a GPU's memory, beside the graphs' budget: libraries' workspaces, and what a step without a graph takes in passing."""
MAX_VERIFICATIONS = 1  # of graphs, between steps
LAUNCH_FAILED = "it could not be launched; the log has it"
SPARE_STAGES = 2  # so that nothing rests on who is first to hear that a step is over


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
        run_ahead: int | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        """`backend` is by default CUDA's on a GPU, if the model can be captured, else the eager one; `run_ahead` 1 there and
        0 here.

        Raises SettingsError when the padding asked for does not go with the backend.
        """
        self._loaded = loaded
        self._settings = settings
        self._clock: Clock = clock or SystemClock()
        self._device = loaded.model.device
        is_cuda = self._device.type == "cuda"
        can_capture = is_cuda and loaded.model.is_capturable
        self._backend: Backend = backend or (_cuda_backend(self._device) if can_capture else EagerBackend())
        self._run_ahead = int(is_cuda) if run_ahead is None else run_ahead
        self._load_seconds = load_seconds
        self._is_padded = _is_padded(settings, self._backend)
        scheduler = settings.scheduler
        self._buckets = Buckets(
            num_slots=scheduler.num_slots,
            max_step_tokens=scheduler.max_step_tokens,
            max_padding_ratio=settings.graphs.max_padding_ratio,
        )
        self._core = self._core_keys() if can_capture and self._is_padded else frozenset()
        self._thread = ForwardThread(self._device)
        self._info: EngineInfo | None = None
        self._cache: GraphCache[StepKey] | None = None
        self._num_outstanding = 0
        self._last_done_seconds = 0.0  # on the clock; of whoever finishes steps
        self._is_started = False
        self._is_closed = False
        self._is_failed = False  # written by the engine's threads

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
        except (
            asyncio.CancelledError
        ):  # the daemon is to end; its own `close` waits for the thread, as long as it likes
            self._is_closed = True
            raise
        except BaseException:
            self._is_closed = True
            await in_daemon_thread(self._thread.close)
            raise
        self.graphs.start()

    def step(self, batch: Batch) -> Awaitable[StepOutput]:
        info = self.info
        assert not self._is_closed, "the engine is closed"
        assert len(batch.rows) <= info.num_slots, f"{len(batch.rows)} rows, {info.num_slots} slots"
        assert batch.num_tokens <= info.max_step_tokens, f"{batch.num_tokens} tokens, {info.max_step_tokens} a step"
        assert self._num_outstanding <= self._run_ahead, f"{self._num_outstanding} steps are outstanding already"
        self._num_outstanding += 1
        return self._thread.launch(lambda: self._run(batch), on_done=self._note_done)

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
            await in_daemon_thread(self._cache.close)
        await in_daemon_thread(self._thread.close)

    def _note_done(self) -> None:
        self._num_outstanding -= 1

    # On the forward thread.

    def _allocate(self) -> None:
        start_seconds = self._clock.monotonic()
        settings, model = self._settings, self._loaded.model
        num_slots, max_step_tokens = settings.scheduler.num_slots, settings.scheduler.max_step_tokens
        device = self._device
        if settings.model.num_threads is not None:
            torch.set_num_threads(settings.model.num_threads)  # holds for the threads of this thread's own steps
        block_size = settings.kv_cache.block_size
        is_verified = self._backend.needs_verification
        num_probe_blocks = -(-(PREFIX_TOKENS + max_step_tokens) // block_size) if is_verified else 0
        context_length = min(model.context_length, settings.model.max_context or model.context_length)
        max_blocks = max(-(-context_length // block_size), num_probe_blocks)

        def allocate(num_slots: int) -> StepState:
            return StepState.allocate(
                model,
                num_slots=num_slots,
                max_tokens=max_step_tokens,
                max_rows=settings.scheduler.num_slots,
                max_blocks=max_blocks,
                num_stages=self._run_ahead + 1 + MAX_VERIFICATIONS + SPARE_STAGES,
            )

        try:
            self._live = allocate(num_slots)
            shadow = allocate(0) if is_verified else None
            kv_cache = KvCache(
                model.kv_layout,
                settings.kv_cache,
                dtype=model.dtype,
                device=device,
                num_probe_blocks=num_probe_blocks,
                max_blocks=num_slots * -(-context_length // block_size),
                reserved_bytes=settings.graphs.budget_bytes + RESERVED_BYTES,
            )
        except (RuntimeError, MemoryError) as error:
            raise ModelLoadError(f"no memory for the engine's buffers: {error}") from error
        context_length = kv_cache.context_length(context_length)
        probe = None
        if is_verified:
            num_positions = min(context_length, num_probe_blocks * block_size)
            probe = ProbeLayout(num_positions=num_positions, vocabulary_size=model.vocabulary_size)
        self._program = StepProgram(
            model,
            kv_cache,
            self._live,
            shadow,
            self._thread,
            probe=probe,
            backend=self._backend,
            is_idle=lambda: self._num_outstanding == 0,
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
        try:
            self._warm_up(context_length)
        except RuntimeError as error:
            raise ModelLoadError(f"a first step failed: {error}") from error
        self._queue_core(cache)
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
            gpu_address=gpu_address(device),
        )

    def _warm_up(self, context_length: int) -> None:
        """A few tokens in the scratch slot: no request pays for libraries that set themselves up."""
        live, slot = self._live, self._live.slots.scratch_slot
        scheduler = self._settings.scheduler
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self._device)  # weights and buffers may still be written by another stream
        max_step_tokens = min(scheduler.max_step_tokens, context_length)  # of one row
        is_invariant = self._settings.model.batch_invariant
        steps = warm_up_steps(scheduler.num_slots, max_step_tokens, is_cuda=is_cuda, is_invariant=is_invariant)
        for sampler, lengths in steps:
            rows = [Row(slot, 0, length, [0] * length, is_sampled=False) for length in lengths]
            live.fill(Batch(step=0, rows=rows, sampler=sampler), len(rows))
            self._program.run(live, sum(lengths), len(rows), sampler, is_fixed=is_cuda)
            live.buffers.note_run()
            if is_cuda:  # before the next one is filled in, and before the shadow is used from another stream
                torch.cuda.synchronize(self._device)

    # The core: shapes that nearly everyone needs, captured first and kept.

    def _core_keys(self) -> frozenset[StepKey]:
        shapes = [(rows, rows) for rows in CORE_DECODE_ROWS] + [(tokens, 1) for tokens in CORE_PREFILL_TOKENS]
        keys = (self._buckets.key(*shape, sampler) for sampler in CORE_SAMPLERS for shape in shapes)
        return frozenset(key for key in keys if key is not None)

    def _queue_core(self, cache: GraphCache[StepKey]) -> None:
        if not self._core:
            return

        def pin(event: Event[StepKey]) -> None:
            if event.type is EventType.PUBLISHED and event.graph is not None and event.graph.key in self._core:
                with contextlib.suppress(UnknownGraphError, GraphStateError):  # it went again: the budget is that small
                    cache.pin(event.graph.name, CORE_PIN_SECONDS)

        cache.add_listener(pin)
        for key in sorted(self._core, key=lambda key: (CORE_SAMPLERS.index(key.sampler), key.tokens)):
            cache.request(key, Priority.WAITED)

    # Steps.

    def _run(self, batch: Batch) -> Deferred[StepOutput]:
        """On the forward thread: launches a step."""
        if self._is_failed:
            raise engine_failed()
        try:
            launched = self._launch(batch)
        except Exception as error:
            raise self._fail(batch, error) from error
        return Deferred(lambda: self._finish(batch, launched))

    def _finish(self, batch: Batch, launched: Deferred[StepOutput]) -> StepOutput:
        try:
            return launched.finish()
        except Exception as error:
            raise self._fail(batch, error) from error

    def _fail(self, batch: Batch, error: Exception) -> EngineFailedError:
        self._is_failed = True
        log.error("step %d failed: the engine is beyond use", batch.step, exc_info=error)
        return engine_failed()

    def _launch(self, batch: Batch) -> Deferred[StepOutput]:
        start_seconds = self._clock.monotonic()
        choice = self._chooser.choose(batch)
        try:
            step = self._live.fill(batch, choice.rows)
            if choice.graph is None:
                self._program.run(self._live, choice.tokens, choice.rows, batch.sampler)
            elif not self._replay(choice.graph):
                key = choice.graph.key
                choice = self._chooser.withdraw(choice, LAUNCH_FAILED)
                # What the graph was recorded from, for the step lies there in the graph's shape.
                self._program.run(self._live, choice.tokens, choice.rows, key.sampler, is_fixed=self._is_padded)
            number = self._live.buffers.note_run(batch.num_logprobs)
            self._chooser.launched()
            over = self._thread.after_launched(lambda: self._live.buffers.read(batch, step, number))
        except BaseException:
            self._chooser.abandon(choice)
            raise
        return Deferred(lambda: self._read(batch, choice, over, start_seconds))

    def _replay(self, graph: Graph[StepKey]) -> bool:
        """Whether the graph was launched. Where it was not, nothing of it runs.

        Raises what the step raised where a replay is no launch but the step itself: some of it may have run then.
        """
        try:
            graph.replay()
        except Exception:
            if not self._backend.is_fixed_shape:
                raise
            log.exception("the graph %s could not be launched: its step runs without it", graph.name)
            return False
        return True

    def _read(
        self,
        batch: Batch,
        choice: Choice,
        over: Deferred[tuple[list[int | None], list[TokenLogprobs | None], list[int]]],
        start_seconds: float,
    ) -> StepOutput:
        """Where a step's end is waited for: the forward thread, or its reader."""
        try:
            token_ids, logprobs, failed_rows = over.finish()
        except BaseException:
            self._chooser.abandon(choice)
            raise
        now = self._clock.monotonic()
        seconds = now - max(start_seconds, self._last_done_seconds)  # it may have waited for the step before
        self._last_done_seconds = now
        receipt = self._chooser.finish(batch, choice, seconds)
        return StepOutput(batch.step, token_ids, receipt, logprobs, failed_rows)


def warm_up_steps(
    num_slots: int, max_step_tokens: int, *, is_cuda: bool, is_invariant: bool = False
) -> list[tuple[Sampler, list[int]]]:
    """The steps that are run before the first request: sampler, and the tokens of each row.

    On a GPU kernels differ with the number of tokens and rows and are compiled and loaded at their first use, so there are
    steps of all orders of size; and the largest, since the memory that a step takes in passing stays with its stream.
    is_invariant: products of long steps have kernels of their own for up to 128 tokens, and for blocks of as many.
    """
    steps = [(sampler, [num_tokens]) for sampler in Sampler for num_tokens in (1, 2, 3)]
    if is_cuda:
        max_rows = min(num_slots, max_step_tokens)
        row_counts = [2**power for power in range(1, max_rows.bit_length()) if 2**power < max_rows]
        steps += [(Sampler.GREEDY, [1] * num_rows) for num_rows in row_counts]
        steps += [(Sampler.FILTERED, [1] * max_rows), (Sampler.GREEDY, [max_step_tokens])]
        prompts = (8, 16, 32, 64, 128, 256, 384) if is_invariant else (8, 16, 32, 64)
        steps += [(Sampler.GREEDY, [num_tokens]) for num_tokens in prompts if num_tokens < max_step_tokens]
    return steps


def _cuda_backend(device: torch.device) -> Backend:
    from graphcache.backends.cuda import CudaBackend

    return CudaBackend(device)


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


def gpu_address(device: torch.device) -> str | None:
    """Where the GPU is on the PCI bus, as the kernel writes it; None for anything else."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types leave some of them out
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
