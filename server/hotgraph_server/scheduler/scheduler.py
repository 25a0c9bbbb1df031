"""The scheduler's loop: plan a step, hand it to the engine, hand its tokens on. It runs on the event loop and never blocks it.

With an engine that runs ahead, the next step is submitted before the last one is read. What a sequence did after its end is
thrown away, and its slot and blocks are held until the last step that uses them is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from graphcache import CacheClosedError, Clock, DeviceLostError, Event, EventType, Priority, SystemClock
from hotgraph_server.batch import StepKey, StepOutput
from hotgraph_server.config import SchedulerSettings
from hotgraph_server.engine.failure import engine_failed
from hotgraph_server.engine.interface import Engine
from hotgraph_server.errors import (
    CancelledRequestError,
    DeadlineError,
    DrainingError,
    DuplicateRequestError,
    EngineFailedError,
    HotgraphError,
    InternalError,
    QueueFullError,
    ServerTimeLimitError,
)
from hotgraph_server.request import FinishedEvent, GraphMode, Request, TokenLogprobs, TokensEvent
from hotgraph_server.scheduler.admission import Admission
from hotgraph_server.scheduler.blocks import BlockManager
from hotgraph_server.scheduler.observer import Observer
from hotgraph_server.scheduler.planner import Plan, Planner
from hotgraph_server.scheduler.quarantine import Quarantine
from hotgraph_server.scheduler.sequence import Sequence
from hotgraph_server.scheduler.slots import SlotPool
from hotgraph_server.scheduler.status import KvCacheStatus, SchedulerStatus
from hotgraph_server.scheduler.stream import RequestStream
from hotgraph_server.scheduler.ticket import Ticket
from hotgraph_server.text import Tokenizer

logger = logging.getLogger("hotgraph.scheduler")

DRAIN_RETRY_SECONDS = 1.0
# From a step of prompts to the hashing of their blocks: the engine's thread has launched it then, which it could not while
# this one holds the interpreter's lock, and the step still runs. Left to the step's end, hashing would hold up the tokens.
HASH_DELAY_SECONDS = 0.001


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    result: asyncio.Future[StepOutput]


class Scheduler:
    """Runs requests on one engine. All methods belong to the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: SchedulerSettings,
        *,
        clock: Clock | None = None,
    ) -> None:
        """The engine must be started."""
        info = engine.info
        self.on_failure: Callable[[HotgraphError], None] | None = None
        # First of all, for whatever a request that comes should find awake.
        self.on_submit: Callable[[], None] | None = None
        self.observer: Observer | None = None
        self.quarantine: Quarantine | None = None
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._clock = clock or SystemClock()
        self._admission = Admission(engine, settings)
        self._blocks = BlockManager(info.num_blocks, info.block_size, prefix_caching=settings.prefix_caching)
        self._planner = Planner(
            SlotPool(info.num_slots),
            self._blocks,
            max_step_tokens=info.max_step_tokens,
            shares_prefixes=settings.prefix_caching,
            may_start=self._may_start,
            takes_back=settings.fair_preemption,
        )
        self._tickets: dict[str, Ticket] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._is_draining = False
        self._failure: HotgraphError | None = None
        self._engine_moved_at = 0.0  # on the clock; of meaning while steps are in flight
        self._counts = self._zero_counts()

    def _zero_counts(self) -> SchedulerStatus:
        info = self._engine.info
        return SchedulerStatus(
            num_slots=info.num_slots,
            max_waiting=self._settings.max_waiting,
            kv_cache=KvCacheStatus(
                block_size=info.block_size, num_blocks=info.num_blocks - 1, size_bytes=info.kv_cache_bytes
            ),
        )

    async def start(self) -> None:
        """Starts the loop."""
        loop = asyncio.get_running_loop()

        def on_graph_event(event: Event[StepKey]) -> None:  # called on the capture thread
            is_lost = event.type is EventType.FAILED and self._engine.graphs.lost is not None
            if is_lost or event.type is EventType.PUBLISHED:
                with contextlib.suppress(RuntimeError):  # the loop may be closed already when the daemon stops
                    loop.call_soon_threadsafe(self._lose if is_lost else self._wake.set)

        self._engine.graphs.add_listener(on_graph_event)
        self._task = loop.create_task(self._run(), name="scheduler")

    async def close(self) -> None:
        """Ends every request and the loop, once the steps in flight are done."""
        self._is_draining = True
        self.end_all(DrainingError("the daemon is stopping", retry_after_seconds=DRAIN_RETRY_SECONDS))
        while self._in_flight and self._failure is None:
            await asyncio.wait([self._in_flight[-1].result])
            await asyncio.sleep(0)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    # From outside.

    def submit(self, request: Request) -> RequestStream:
        """Queues a request and returns its stream at once.

        Raises DrainingError, EngineFailedError, DuplicateRequestError, DeadlineError, ContextLengthError, QueueFullError,
        GraphNotReadyError, NotPossibleError or InvalidRequestError, or InternalError for one that is in quarantine; nothing is
        kept of a request that was refused.
        """
        if self.on_submit is not None:
            self.on_submit()
        if self._failure is not None:
            raise self._failure
        if self._is_draining:
            raise DrainingError("the daemon is stopping", retry_after_seconds=DRAIN_RETRY_SECONDS)
        if request.request_id in self._tickets:
            raise DuplicateRequestError(f"a request with id {request.request_id!r} is in flight")
        now = self._clock.monotonic()
        if request.deadline is not None and request.deadline <= now:
            raise self._deadline_error(request)
        self._admission.check_fits(request)
        leaving = self._who_gives_way(request)
        self._admission.check_graphs(request)
        digest = b"" if self.quarantine is None else self.quarantine.check(request)
        ticket = Ticket(request, self._tokenizer, now, self._cancel)
        ticket.digest = digest
        for other in leaving:
            self._abort(other, self._admission.queue_full(len(self._planner.waiting), gives_way=True))
        self._set_graph_wait(ticket)
        self._set_deadline(ticket)
        self._tickets[request.request_id] = ticket
        self._counts.num_requests += 1
        self._idle.clear()
        for sequence in ticket.sequences:
            self._planner.add(sequence)
            if sequence.finish is not None:  # its resumed tokens were all of it
                self._finish_choice(sequence, TokensEvent(sequence.choice_index, [], "", [], sequence.finish))
        self._end_if_done(ticket)
        self._wake.set()
        return ticket.stream

    def _who_gives_way(self, request: Request) -> list[Ticket]:
        """Whose places in a full queue the request takes, which is nobody's when there is room.

        They are the last that came of the caller of whom most wait, who then still has no less than the newcomer. Raises
        QueueFullError when that is not to be had.
        """
        waiting, num_new = self._planner.waiting, len(request.choice_indices)
        num_missing = self._admission.num_missing(
            num_new, num_running=self._planner.slots.num_used, num_waiting=len(waiting)
        )
        leaving: dict[str, Ticket] = {}
        num_gained = 0
        greediest = waiting.fullest() if num_missing > 0 else None
        for sequence in () if greediest is None else waiting.newest_of(greediest):
            if num_gained >= num_missing:
                break
            ticket = sequence.ticket
            # What has begun is not thrown away.
            if ticket.first_step_time is None and ticket.request.request_id not in leaving:
                leaving[ticket.request.request_id] = ticket
                num_gained += sum(not each.is_finished for each in ticket.sequences)
        is_fair = greediest is not None and (
            waiting.num_of(greediest) - num_gained >= waiting.num_of(request.client) + num_new
        )
        if num_missing > 0 and not (num_gained >= num_missing and is_fair):
            self._counts.num_rejected += 1
            raise self._admission.queue_full(len(waiting))
        return list(leaving.values())

    def drain(self) -> None:
        """Admits no more; what runs or waits goes on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no request runs or waits and no step is in flight."""
        await self._idle.wait()

    def end_all(self, error: HotgraphError) -> None:
        """Every request ends with this error."""
        for ticket in list(self._tickets.values()):
            self._abort(ticket, error)

    def apply(self, settings: SchedulerSettings) -> None:
        """Takes over max_waiting, for requests to come. What else may differ was settled when the scheduler was made."""
        self._settings = settings
        self._admission.apply(settings)
        self._counts.max_waiting = settings.max_waiting

    def forget_counts(self) -> None:
        """As if nothing had run yet: for a self-test, which is no request of anyone. Nothing may run or wait."""
        assert not self._tickets
        self._counts = self._zero_counts()
        self._admission = Admission(self._engine, self._settings)

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return len(self._tickets)

    @property
    def engine_moved_at(self) -> float | None:
        """When the engine last took or gave back a step, on the clock; None while it has none."""
        return self._engine_moved_at if self._in_flight else None

    def status(self) -> SchedulerStatus:
        """A snapshot of counts and fill."""
        counts, planner, blocks = self._counts, self._planner, self._blocks
        counts.num_running = planner.slots.num_used
        counts.num_waiting = len(planner.waiting)
        counts.num_preemptions = planner.num_preemptions
        counts.kv_cache.num_free_blocks = blocks.num_free
        counts.kv_cache.num_cached_blocks = blocks.num_cached
        counts.kv_cache.num_used_blocks = blocks.num_used
        return counts.snapshot()

    # The loop.

    def advance(self) -> None:
        """Hands on what is done and gives the engine what it may have, now and not at the loop's next turn.

        For who has just submitted a request and means to do something else: the engine works meanwhile.
        """
        self._turn(is_reader_first=False)

    def _turn(self, *, is_reader_first: bool) -> None:
        if self._failure is not None:
            return
        try:
            while self._in_flight and self._in_flight[0].result.done():
                self._retire(self._in_flight.popleft())
            if is_reader_first and self._in_flight and len(self._tickets) == 1:
                self._wake.set()
                return
            self._submit_steps()
            self._update_idle()
        except HotgraphError as error:
            self._fail(error)
        except Exception:
            incident = uuid.uuid4().hex
            logger.exception("the scheduler failed, incident %s", incident)
            self._fail(EngineFailedError("the engine failed", retry_after_seconds=1.0, metadata={"incident": incident}))

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self.advance()
            await self._wake.wait()

    def _on_step_done(self, _: asyncio.Future[StepOutput]) -> None:
        """In the future's callback and not in the loop's task, which would be one more turn before the tokens are out.

        While the engine is busy with another step, a lone request's reader comes before the next plan: launching that would
        hold him up. Many readers would hold up the plan.
        """
        self._turn(is_reader_first=True)

    def _submit_steps(self) -> None:
        while len(self._in_flight) <= self._engine.info.run_ahead:
            plan = self._planner.plan()
            if plan is None:
                return
            now = self._clock.monotonic()
            if not self._in_flight:
                self._engine_moved_at = now
            for sequence in plan.sequences:
                if sequence.ticket.first_step_time is None:
                    sequence.ticket.first_step_time = now
                    if self.quarantine is not None:
                        self.quarantine.begin(sequence.ticket)
            result = asyncio.ensure_future(self._engine.step(plan.batch))
            result.add_done_callback(self._on_step_done)
            self._in_flight.append(_InFlight(plan, result))
            self._counts.num_steps += 1
            if self._settings.prefix_caching and any(row.token_ids is not None for row in plan.batch.rows):
                asyncio.get_running_loop().call_later(HASH_DELAY_SECONDS, self._planner.work_out_hashes, plan)

    def _retire(self, step: _InFlight) -> None:
        output = step.result.result()  # raises what the engine raised
        now = self._engine_moved_at = self._clock.monotonic()
        if self.observer is not None:
            self.observer.step_done(step.plan.sequences, output, now)
        counts = self._counts
        failed = set(output.failed_rows)
        tickets = {id(sequence.ticket): sequence.ticket for sequence in step.plan.sequences}
        for ticket in tickets.values():
            ticket.note_step(output.receipt)
        for index, (row, sequence) in enumerate(zip(step.plan.batch.rows, step.plan.sequences, strict=True)):
            self._planner.retire(sequence, row)
            if sequence.ticket.is_ended or sequence.is_finished:
                continue  # it ended while this step was in flight
            if index in failed:
                self._fail_row(sequence)
                continue
            if row.token_ids is not None:
                counts.num_prompt_tokens += row.num_tokens
            token_id = output.token_ids[index]
            if token_id is None:
                self._planner.commit(sequence)
                continue
            counts.num_completion_tokens += 1
            text = sequence.accept(token_id)
            sequence.time_token(now)
            self._planner.commit(sequence)
            event = TokensEvent(sequence.choice_index, [token_id], text, self._logprobs(sequence, output, index))
            if sequence.finish is None:
                sequence.ticket.stream.put(event)
            else:
                event.finish = sequence.finish
                self._finish_choice(sequence, event)
        for ticket in tickets.values():
            self._end_if_done(ticket)
        if self.quarantine is not None:
            self.quarantine.step_done()

    @staticmethod
    def _logprobs(sequence: Sequence, output: StepOutput, index: int) -> list[TokenLogprobs]:
        num_top = sequence.ticket.request.num_logprobs
        logprobs = output.logprobs[index] if num_top is not None else None
        return [] if logprobs is None or num_top is None else [logprobs.limited(num_top)]

    # Ends.

    def _finish_choice(self, sequence: Sequence, event: TokensEvent) -> None:
        self._planner.finish(sequence)
        self._counts.kv_cache.num_cached_tokens += sequence.num_cached_tokens or 0
        ticket = sequence.ticket
        if ticket.first_step_time is not None:
            self._admission.note_sequence(self._clock.monotonic() - ticket.first_step_time)
        ticket.stream.put(event)

    def _end_if_done(self, ticket: Ticket) -> None:
        if not ticket.is_ended and ticket.is_done:
            self._counts.num_finished += 1
            now = self._clock.monotonic()
            self._end(ticket, ticket.finished_event(now), now)

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.is_ended:
            self._abort(ticket, CancelledRequestError("the caller left"))

    def _expire(self, ticket: Ticket) -> None:
        self._abort(ticket, self._deadline_error(ticket.request))

    @staticmethod
    def _deadline_error(request: Request) -> DeadlineError:
        if request.is_server_deadline:
            return ServerTimeLimitError("the server's time limit for one request passed")
        return DeadlineError("the request's deadline passed")

    def _fail_row(self, sequence: Sequence) -> None:
        incident = uuid.uuid4().hex
        logger.error("logits of request %s are not finite, incident %s", sequence.ticket.request.request_id, incident)
        self._abort(sequence.ticket, InternalError(incident))

    def _abort(self, ticket: Ticket, error: HotgraphError) -> None:
        """Ends a request with an error. Its slots and blocks are free now, or when the step in flight is done."""
        if ticket.is_ended:
            return
        if isinstance(error, CancelledRequestError):
            self._counts.num_cancelled += 1
        elif isinstance(error, QueueFullError):
            self._counts.num_rejected += 1
        elif isinstance(error, DeadlineError):
            self._counts.num_expired += 1
        else:
            self._counts.num_failed += 1
        self._end(ticket, error, self._clock.monotonic())
        # After a failure the planner may stand half way through a plan, and to clean up there could fail again: what matters
        # then is that everybody hears of it and the process ends.
        if self._failure is None:
            for sequence in ticket.sequences:
                if not sequence.is_finished:
                    self._planner.finish(sequence)
        self._wake.set()

    def _end(self, ticket: Ticket, end: FinishedEvent | HotgraphError, now: float) -> None:
        self._tickets.pop(ticket.request.request_id, None)
        ticket.end(end)
        # Of a failure it is to be remembered who ran.
        if self.quarantine is not None and self._failure is None:
            self.quarantine.end(ticket, end)
        if self.observer is not None:
            self.observer.request_ended(ticket, end, now)

    def _lose(self) -> None:
        """A capture found that the device is lost, before a step did."""
        if self._failure is None:
            self._fail(engine_failed())
            self._wake.set()

    def _fail(self, error: HotgraphError) -> None:
        self._failure = error
        for step in self._in_flight:
            # They fail as well, or not; nobody asks any more.
            step.result.add_done_callback(lambda result: result.cancelled() or result.exception())
        self._in_flight.clear()
        self.end_all(error)
        self._idle.set()
        if self.on_failure is not None:
            self.on_failure(error)

    def _update_idle(self) -> None:
        if self._tickets or self._in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    # Timers and graphs.

    def _set_deadline(self, ticket: Ticket) -> None:
        deadline = ticket.request.deadline
        if deadline is not None:
            loop = asyncio.get_running_loop()
            ticket.timer = loop.call_later(deadline - ticket.accept_time, self._expire, ticket)

    def _set_graph_wait(self, ticket: Ticket) -> None:
        """For GraphMode.WAIT_UP_TO: asks for missing graphs and notes how long the request may wait for them."""
        policy = ticket.request.graph_policy
        if policy.mode is not GraphMode.WAIT_UP_TO:
            return
        missing = self._admission.missing_graphs(ticket.request)
        try:
            for key in missing:
                self._engine.graphs.request(key, Priority.WAITED)
        except (CacheClosedError, DeviceLostError):
            raise engine_failed() from None
        if missing:
            ticket.wait_until = ticket.accept_time + policy.max_wait_seconds
            asyncio.get_running_loop().call_later(policy.max_wait_seconds, self._wake.set)

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether its time is not over, it has the graphs that it waits for, and it need not wait for another's trial.

        Of a loop that was held up, a step's end may come round before the timers that are due.
        """
        ticket = sequence.ticket
        now = self._clock.monotonic()
        deadline = ticket.request.deadline
        if deadline is not None and now >= deadline:
            return False  # its timer ends it
        return self._graphs_ready(ticket, now) and (self.quarantine is None or self.quarantine.may_start(ticket))

    def _graphs_ready(self, ticket: Ticket, now: float) -> bool:
        if ticket.wait_until is None:
            return True
        if now >= ticket.wait_until or not self._admission.missing_graphs(ticket.request):
            ticket.wait_until, ticket.graphs_ready_time = None, now
            return True
        return False
