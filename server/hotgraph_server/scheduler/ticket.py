"""A request inside the scheduler: its sequences, its stream, and what will be told of it at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hotgraph_server.batch import Phase, StepReceipt
from hotgraph_server.errors import HotgraphError
from hotgraph_server.request import FinishedEvent, Receipt, Request, StepGroup, Timings, Usage
from hotgraph_server.scheduler.sequence import Sequence
from hotgraph_server.scheduler.stream import RequestStream
from hotgraph_server.text import Tokenizer


class _Group:
    """Steps of one kind, while they are counted."""

    __slots__ = ("first", "is_uniform", "num_padding_tokens", "num_steps", "seconds")

    def __init__(self, first: StepReceipt) -> None:
        self.first = first
        self.num_steps = 0
        self.num_padding_tokens = 0
        self.seconds = 0.0
        self.is_uniform = True

    def add(self, receipt: StepReceipt) -> None:
        self.num_steps += 1
        self.seconds += receipt.seconds
        self.num_padding_tokens += receipt.tokens_bucket - receipt.num_tokens
        first = self.first
        if (receipt.tokens_bucket, receipt.rows_bucket) != (first.tokens_bucket, first.rows_bucket):
            self.is_uniform = False

    def summary(self) -> StepGroup:
        first = self.first
        return StepGroup(
            phase=first.phase.value,
            graph=first.graph,
            num_steps=self.num_steps,
            tokens_bucket=first.tokens_bucket if self.is_uniform else 0,
            rows_bucket=first.rows_bucket if self.is_uniform else 0,
            num_padding_tokens=self.num_padding_tokens,
            graph_age_seconds=first.graph_age_seconds,
            engine_seconds=self.seconds,
        )


class Ticket:
    """One request from `submit` to its end. Times are seconds on the scheduler's clock."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, accept_time: float, on_close: Callable[[Ticket], None]
    ) -> None:
        self.request = request
        self.accept_time = accept_time
        self.first_step_time: float | None = None
        self.timer: asyncio.TimerHandle | None = None  # ends it at its deadline
        self.wait_until: float | None = None  # GraphMode.WAIT_UP_TO: admitted without graphs from then on
        self.graphs_ready_time: float | None = None  # when that wait was over
        self.digest = b""  # of what it asks, where crashes are remembered
        self.crash_place: int | None = None  # in the crash record, while it runs
        self.stream = RequestStream(request, lambda: on_close(self))
        self.sequences = [Sequence(self, index, tokenizer) for index in request.choice_indices]
        self.is_ended = False
        self._groups: dict[tuple[Phase, str], _Group] = {}

    @property
    def is_done(self) -> bool:
        """Whether every choice has its finish."""
        return all(sequence.finish is not None for sequence in self.sequences)

    def note_step(self, receipt: StepReceipt) -> None:
        """Counts a step the request took part in: once, however many of its choices did."""
        key = (receipt.phase, receipt.graph)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(receipt)
        group.add(receipt)

    def end(self, end: FinishedEvent | HotgraphError) -> None:
        """The stream's last word; the deadline's timer is stopped."""
        self.is_ended = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.stream.end(end)

    def finished_event(self, now: float) -> FinishedEvent:
        """What is told at the end, once every choice has its finish."""
        return FinishedEvent(
            choices=tuple(sequence.finish for sequence in self.sequences if sequence.finish is not None),
            usage=Usage(
                prompt_tokens=len(self.request.prompt_token_ids),
                completion_tokens=sum(sequence.num_completion_tokens for sequence in self.sequences),
                cached_prompt_tokens=self.sequences[0].num_cached_tokens or 0,
            ),
            timings=self._timings(now),
            receipt=self._receipt(),
        )

    def _timings(self, now: float) -> Timings:
        firsts = [s.first_token_time for s in self.sequences if s.first_token_time is not None]
        lasts = [s.last_token_time for s in self.sequences if s.last_token_time is not None]
        first_step = now if self.first_step_time is None else self.first_step_time
        first_token = min(firsts, default=now)
        longest = max(self.sequences, key=lambda sequence: sequence.num_completion_tokens)
        return Timings(
            queue=first_step - self.accept_time,
            prefill=first_token - first_step,
            decode=max(lasts, default=now) - first_token,
            time_to_first_token=first_token - self.accept_time,
            time_per_output_token=longest.time_per_output_token,
            total=now - self.accept_time,
        )

    def _receipt(self) -> Receipt:
        groups = tuple(group.summary() for group in self._groups.values())
        num_graph_steps = sum(group.num_steps for group in groups if group.graph)
        num_steps = sum(group.num_steps for group in groups)
        return Receipt(
            num_steps=num_steps,
            num_graph_steps=num_graph_steps,
            num_eager_steps=num_steps - num_graph_steps,
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            step_groups=groups,
        )
