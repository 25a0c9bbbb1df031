"""An engine without a model: deterministic tokens, settable times and failures, and a hard check of its contract.

It ships so that scheduler, RPC layer and daemon are tested, and load-tested, without torch. The graph cache it runs through
is a real one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from graphcache import Backend, CacheSettings, Clock, EagerBackend, FakeClock, GraphCache, SystemClock
from hotgraph_server.batch import Batch, EngineInfo, Sampler, StepKey, StepOutput
from hotgraph_server.engine.buckets import Buckets
from hotgraph_server.engine.contract import ContractChecker
from hotgraph_server.engine.failure import engine_failed
from hotgraph_server.engine.replay import GraphChooser
from hotgraph_server.engine.token_rules import TokenRule, hash_rule
from hotgraph_server.errors import EngineFailedError
from hotgraph_server.request import TokenLogprobs
from hotgraph_server.threads import in_daemon_thread

log = logging.getLogger(__name__)


class _FakeProgram:
    """What the cache captures: nothing."""

    def bind(self, key: StepKey) -> Callable[[], None]:
        return lambda: None

    def verify(self, key: StepKey, replay: Callable[[], None]) -> bool:
        replay()
        return True


class FakeEngine:
    """Implements Engine.

    - `rule` says the next token of a row; see `token_rules`. A token that the row bans is replaced by one of `hash_rule`.
    - `step_seconds`: how long a step takes, or a function of the batch. With a FakeClock no real time passes: the clock is
      advanced by it. With another clock the engine waits.
    - `backend`: EagerBackend by default. `cache_thread=False`: tests call `graphs.run_pending()` themselves.

    A batch that breaks the contract raises AssertionError from `step` itself. `batches` holds all batches submitted.
    """

    def __init__(
        self,
        *,
        rule: TokenRule | None = None,
        step_seconds: float | Callable[[Batch], float] = 0.0,
        clock: Clock | None = None,
        backend: Backend | None = None,
        cache_settings: CacheSettings | None = None,
        cache_thread: bool = True,
        num_slots: int = 8,
        num_blocks: int = 257,
        block_size: int = 16,
        context_length: int = 1024,
        vocabulary_size: int = 258,
        max_step_tokens: int = 256,
        run_ahead: int = 0,
        max_padding_ratio: float = 2.0,
        model_id: str = "fake",
    ) -> None:
        self.rule = rule or hash_rule()
        self.step_seconds = step_seconds
        self.batches: list[Batch] = []
        self._clock: Clock = clock or SystemClock()
        self._backend: Backend = backend or EagerBackend()
        self._cache_settings = cache_settings
        self._cache_thread = cache_thread
        self._buckets = Buckets(
            num_slots=num_slots, max_step_tokens=max_step_tokens, max_padding_ratio=max_padding_ratio
        )
        self._info = EngineInfo(
            model_id=model_id,
            architecture="FakeForCausalLM",
            runner="decoder",
            dtype="float32",
            device="cpu",
            device_name="fake",
            num_parameters=0,
            weights_bytes=0,
            load_seconds=0.0,
            load_time=self._clock.time(),
            vocabulary_size=vocabulary_size,
            context_length=min(context_length, (num_blocks - 1) * block_size),
            num_slots=num_slots,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_cache_bytes=0,
            max_step_tokens=max_step_tokens,
            run_ahead=run_ahead,
        )
        self._checker = ContractChecker(self._info)
        self._fallback = hash_rule()
        self._cache: GraphCache[StepKey] | None = None
        self._chooser: GraphChooser | None = None
        self._queue: deque[tuple[Batch, list[int | None], list[int], asyncio.Future[StepOutput]]] = deque()
        self._num_outstanding = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._is_failed = False
        self._fail_steps: dict[int, Exception] = {}
        self._nan_rows: dict[int, frozenset[int]] = {}
        self._hold_steps: set[int] = set()
        self._released = asyncio.Event()
        self._is_held = asyncio.Event()

    # Failures and stops that tests ask for.

    def fail_step(self, step: int, error: Exception | None = None) -> None:
        """Step `step` fails with `error`; the engine is beyond use from then on."""
        self._fail_steps[step] = error or RuntimeError("failure asked for by a test")

    def fail_rows(self, step: int, rows: Iterable[int]) -> None:
        """In step `step` the logits of these rows (indices in the batch) are not finite."""
        self._nan_rows[step] = frozenset(rows)

    def hold_step(self, step: int) -> None:
        """Step `step` hangs until `release`."""
        self._hold_steps.add(step)

    async def wait_held(self) -> None:
        """Until a step hangs."""
        await self._is_held.wait()

    def release(self) -> None:
        """Lets hanging steps go on, those to come too."""
        self._hold_steps.clear()
        self._released.set()

    # The engine.

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def graphs(self) -> GraphCache[StepKey]:
        assert self._cache is not None, "the engine is not started"
        return self._cache

    @property
    def num_outstanding(self) -> int:
        """Steps submitted and not done."""
        return self._num_outstanding

    async def start(self) -> None:
        assert self._cache is None, "start is called once"
        settings = self._cache_settings or CacheSettings(
            budget_bytes=1 << 30, policy="value", stall_budget_seconds=0.05
        )
        cache: GraphCache[StepKey] = GraphCache(
            _FakeProgram(), self._backend, settings, clock=self._clock, thread=self._cache_thread
        )
        cache.start()
        self._cache = cache
        self._chooser = GraphChooser(cache, self._buckets, self._clock, is_padded=self._backend.is_fixed_shape)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="fake-engine")

    def step(self, batch: Batch) -> Awaitable[StepOutput]:
        assert self._task is not None, "the engine is not started"
        assert not self._is_closing, "the engine is closed"
        future: asyncio.Future[StepOutput] = asyncio.get_running_loop().create_future()
        if self._is_failed:
            future.set_exception(engine_failed())
            return future
        assert self._num_outstanding <= self._info.run_ahead, (
            f"{self._num_outstanding} steps are outstanding, {self._info.run_ahead + 1} allowed"
        )
        self._checker.check(batch)
        self.batches.append(batch)
        token_ids, failed_rows = self._sample(batch)
        self._num_outstanding += 1
        self._queue.append((batch, token_ids, failed_rows, future))
        self._wake.set()
        return future

    def bucket(self, num_tokens: int, num_rows: int, sampler: Sampler) -> StepKey | None:
        return self._buckets.key(num_tokens, num_rows, sampler)

    async def close(self) -> None:
        self._is_closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        if self._cache is not None:
            await in_daemon_thread(self._cache.close)

    def _sample(self, batch: Batch) -> tuple[list[int | None], list[int]]:
        """The tokens of the batch's rows, and the rows that fail. Known as soon as the batch is: they are pure functions."""
        checker = self._checker
        nan_rows = self._nan_rows.get(batch.step, frozenset())
        token_ids: list[int | None] = []
        failed_rows: list[int] = []
        for index, row in enumerate(batch.rows):
            if not row.is_sampled:
                token_ids.append(None)
                continue
            if index in nan_rows or checker.has_failed(row.slot):
                checker.add_sampled(row.slot, None)
                failed_rows.append(index)
                token_ids.append(None)
                continue
            history, banned = checker.history(row.slot), checker.banned(row.slot)
            token_id = self.rule(history)
            if token_id in banned:
                token_id = self._fallback(history)
            assert token_id not in banned, "the rule and its fallback give only banned tokens"
            assert 0 <= token_id < self._info.vocabulary_size, f"the rule gave token {token_id}"
            checker.add_sampled(row.slot, token_id)
            token_ids.append(token_id)
        return token_ids, failed_rows

    async def _run(self) -> None:
        """Runs the queued steps one after the other, until closed and empty."""
        while True:
            while not self._queue:
                if self._is_closing:
                    return
                self._wake.clear()
                await self._wake.wait()
            batch, token_ids, failed_rows, future = self._queue.popleft()
            try:
                output = await self._run_step(batch, token_ids, failed_rows)
            except Exception as error:
                if not self._is_failed:
                    self._is_failed = True
                    log.exception("step %d failed: the engine is beyond use", batch.step)
                failure = error if isinstance(error, EngineFailedError) else engine_failed()
                if not future.done():
                    failure.__cause__ = None if failure is error else error
                    future.set_exception(failure)
            else:
                if not future.done():  # a caller that was cancelled has cancelled it
                    future.set_result(output)
            finally:
                self._num_outstanding -= 1

    async def _run_step(self, batch: Batch, token_ids: list[int | None], failed_rows: list[int]) -> StepOutput:
        if self._is_failed:
            raise engine_failed()
        assert self._chooser is not None
        start_seconds = self._clock.monotonic()
        if batch.step in self._hold_steps:
            self._is_held.set()
            await self._released.wait()
            self._is_held.clear()
        choice = self._chooser.choose(batch)
        self._chooser.launched()
        try:
            await self._pass_time(batch)
            if (error := self._fail_steps.get(batch.step)) is not None:
                raise error
            if choice.graph is not None:
                choice.graph.replay()
        except BaseException:
            self._chooser.abandon(choice)
            raise
        receipt = self._chooser.finish(batch, choice, self._clock.monotonic() - start_seconds)
        logprobs = () if batch.num_logprobs is None else [self._logprobs(i, batch.num_logprobs) for i in token_ids]
        return StepOutput(batch.step, token_ids, receipt, logprobs, failed_rows)

    async def _pass_time(self, batch: Batch) -> None:
        seconds = self.step_seconds(batch) if callable(self.step_seconds) else self.step_seconds
        if isinstance(self._clock, FakeClock):
            self._clock.advance(seconds)
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(seconds)

    def _logprobs(self, token_id: int | None, num_top: int) -> TokenLogprobs | None:
        """Made up: the chosen token has -0.5, the n-th of the top ones -0.5 - n, counting ids up from the chosen one."""
        if token_id is None:
            return None
        size = self._info.vocabulary_size
        top = tuple(((token_id + n) % size, -0.5 - n) for n in range(num_top))
        return TokenLogprobs((token_id, -0.5), top)
