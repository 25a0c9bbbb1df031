"""What runs next: picks each step's rows, gives and takes slots and blocks. It never waits and knows no stream.

Order of a step: decode rows first, so that running streams never stop; then chunks of prompts already begun; then new
sequences, of those callers first who run least (`waiting.py`).
A sequence that needs a block when none is left takes those of the youngest. Where slots are taken back (`yielding.py`), that
comes before all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from itertools import islice

from hotgraph_server.batch import Batch, BlockAppend, Row, Sampler, SlotAssignment
from hotgraph_server.request import GraphMode
from hotgraph_server.scheduler.blocks import BlockManager
from hotgraph_server.scheduler.sampler import sampler_of, strongest
from hotgraph_server.scheduler.sequence import Sequence, SequenceState
from hotgraph_server.scheduler.slots import SlotPool
from hotgraph_server.scheduler.waiting import WaitingQueue
from hotgraph_server.scheduler.yielding import who_yields

logger = logging.getLogger("hotgraph.scheduler")


@dataclass(slots=True)
class Plan:
    """A step and the sequences of its rows, in the same order."""

    batch: Batch
    sequences: list[Sequence]


@dataclass(slots=True)
class _Draft:
    """A step while it is put together."""

    num_tokens_left: int
    rows: list[Row] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    assignments: list[SlotAssignment] = field(default_factory=list)
    appends: list[BlockAppend] = field(default_factory=list)
    sampler: Sampler = Sampler.GREEDY
    num_logprobs: int | None = None
    is_eager: bool = False


class Planner:
    """Holds the queue and what runs. `may_start` tells whether a sequence that waits may come in now. `takes_back`: a caller
    that runs nothing need not wait for a slot of one that runs several."""

    def __init__(
        self,
        slots: SlotPool,
        blocks: BlockManager,
        *,
        max_step_tokens: int,
        shares_prefixes: bool,
        may_start: Callable[[Sequence], bool],
        takes_back: bool = False,
    ) -> None:
        self.slots = slots
        self.blocks = blocks
        self.waiting: WaitingQueue[Sequence] = WaitingQueue()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0  # because blocks ran out
        self._max_step_tokens = max_step_tokens
        self._shares_prefixes = shares_prefixes
        self._may_start = may_start
        self._takes_back = takes_back
        self._next_step = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self.waiting.append(sequence)

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can run. The step counts as in flight from here on."""
        draft = _Draft(self._max_step_tokens)
        if self._takes_back and self.waiting:
            self._take_back()
        for sequence in list(self.running):
            if sequence.state is SequenceState.DECODE:  # not so any more when an older one has just taken its blocks
                self._plan_decode(draft, sequence)
        for sequence in self.running:
            if sequence.state is SequenceState.PREFILL:
                self._plan_prefill(draft, sequence)
        self._admit(draft)
        if not draft.rows:
            return None
        batch = Batch(
            step=self._next_step,
            rows=draft.rows,
            assignments=draft.assignments,
            block_appends=draft.appends,
            sampler=draft.sampler,
            num_logprobs=draft.num_logprobs,
            is_eager=draft.is_eager,
        )
        self._next_step += 1
        return Plan(batch, draft.sequences)

    def retire(self, sequence: Sequence, row: Row) -> None:
        """A step with this row of the sequence is done. Ended or preempted sequences lose their place with their last step."""
        sequence.num_steps_in_flight -= 1
        if row.is_sampled:
            sequence.num_samples_in_flight -= 1
        sequence.num_computed = row.start + row.num_tokens
        if sequence.state in (SequenceState.WAITING, SequenceState.FINISHED):
            self._release(sequence)

    def commit(self, sequence: Sequence) -> None:
        """Makes the blocks the sequence has filled findable for others. Only for rows that did not fail."""
        if sequence.table is not None:
            num_computed = min(sequence.num_computed, len(sequence.token_ids))
            self.blocks.commit(sequence.table, sequence.token_ids, num_computed)

    def work_out_hashes(self, plan: Plan) -> None:
        """What `commit` will need of a step's prompts. For a time at which nobody waits, while the step runs."""
        for row, sequence in zip(plan.batch.rows, plan.sequences, strict=True):
            if row.token_ids is not None and sequence.table is not None:
                self.blocks.work_out(sequence.table, sequence.token_ids, row.start + row.num_tokens)

    def finish(self, sequence: Sequence) -> None:
        """The sequence ends, whatever the reason: it runs in no later step."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        sequence.move(SequenceState.FINISHED)
        self._release(sequence)

    # One row.

    def _plan_decode(self, draft: _Draft, sequence: Sequence) -> None:
        if draft.num_tokens_left < 1 or not sequence.may_sample or sequence.num_unscheduled < 1:
            return
        if not self._make_room(sequence):
            return
        self._add_row(draft, sequence, 1, token_ids=None, is_sampled=True)

    def _plan_prefill(self, draft: _Draft, sequence: Sequence) -> None:
        num_left = sequence.num_unscheduled
        num_tokens = min(num_left, draft.num_tokens_left)
        if num_tokens < 1:
            return
        start = sequence.num_scheduled
        is_last = num_tokens == num_left
        chunk = sequence.token_ids[start : start + num_tokens]
        self._add_row(draft, sequence, num_tokens, token_ids=chunk, is_sampled=is_last)
        if is_last:
            sequence.move(SequenceState.DECODE)

    def _add_row(
        self,
        draft: _Draft,
        sequence: Sequence,
        num_tokens: int,
        *,
        token_ids: AnySequence[int] | None,
        is_sampled: bool,
    ) -> None:
        assert sequence.slot is not None
        request = sequence.ticket.request
        if is_sampled:
            draft.sampler = strongest(draft.sampler, sampler_of(request, bans_stops=sequence.bans_stops))
            if request.num_logprobs is not None:
                draft.num_logprobs = max(draft.num_logprobs or 0, request.num_logprobs)
        draft.is_eager |= request.graph_policy.mode is GraphMode.EAGER_ONLY
        draft.rows.append(Row(sequence.slot, sequence.num_scheduled, num_tokens, token_ids, is_sampled))
        draft.sequences.append(sequence)
        draft.num_tokens_left -= num_tokens
        self._append_blocks(draft, sequence)
        sequence.num_scheduled += num_tokens
        sequence.num_steps_in_flight += 1
        sequence.num_samples_in_flight += is_sampled

    def _append_blocks(self, draft: _Draft, sequence: Sequence) -> None:
        """Tells the engine of the blocks that joined the table since it was last told."""
        assert sequence.slot is not None
        assert sequence.table is not None
        for index in range(sequence.num_told_blocks, len(sequence.table)):
            draft.appends.append(BlockAppend(sequence.slot, index, sequence.table.blocks[index]))
        sequence.num_told_blocks = len(sequence.table)

    # Coming in.

    def _admit(self, draft: _Draft) -> None:
        if not self.waiting or not self.slots.num_free:
            return
        num_running = Counter(sequence.ticket.request.client for sequence in self.running)
        passed: list[tuple[Sequence, bool]] = []  # may not come in yet, but hold up nobody
        while self.waiting and draft.num_tokens_left > 0 and self.slots.num_free:
            sequence = self._next_waiting(num_running)
            if self._must_wait(sequence):
                passed.append((sequence, self.waiting.is_front(sequence)))
                self.waiting.remove(sequence)
                continue
            prefix = self.blocks.find_prefix(sequence.token_ids)
            num_missing = self.blocks.num_missing(len(sequence.token_ids), prefix)
            # Those that run keep a block each in reserve: else the newcomer would be thrown out again at once.
            if num_missing + len(self.running) > self.blocks.num_available and (self.running or self._has_retiring()):
                break
            if num_missing > self.blocks.num_available:
                break
            self.waiting.remove(sequence, is_turn=True)
            num_running[sequence.ticket.request.client] += 1
            self._take_place(draft, sequence, prefix)
        for sequence, is_front in reversed(passed):
            self.waiting.put_back(sequence, is_front=is_front)

    def _next_waiting(self, num_running: Counter[str]) -> Sequence:
        return self.waiting.next(num_running.__getitem__)

    def _must_wait(self, sequence: Sequence) -> bool:
        if sequence.num_steps_in_flight or not self._may_start(sequence):
            return True  # preempted a moment ago, asked to wait for its graphs, or about to be ended
        # A later choice of one prompt comes in when the first has computed it, and shares its blocks.
        leader = sequence.ticket.sequences[0]
        if leader is sequence or leader.is_finished or leader.first_token_time is not None:
            return False
        return self._shares_prefixes and sequence.num_prompt_tokens > self.blocks.block_size

    def _has_retiring(self) -> bool:
        """Whether a sequence that runs no more still holds its place because of a step in flight."""
        return self.slots.num_used > len(self.running)

    def _take_place(self, draft: _Draft, sequence: Sequence, prefix: list[int]) -> None:
        sequence.slot = self.slots.take()
        sequence.table = self.blocks.open(len(sequence.token_ids), prefix)
        sequence.num_told_blocks = 0
        sequence.num_scheduled = sequence.num_computed = len(prefix) * self.blocks.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_scheduled, sequence.num_prompt_tokens)
        sequence.move(SequenceState.PREFILL)
        self.running.append(sequence)
        draft.assignments.append(sequence.assignment())
        self._plan_prefill(draft, sequence)

    # Making room.

    def _take_back(self) -> None:
        """Takes slots of callers that run several, one for each caller that waits and runs nothing.

        Not while some wait to come back: those would have the slots, since it is blocks that are short.
        """
        if self.waiting.has_front:
            return
        num_coming = self.slots.num_slots - len(self.running)  # free, or so after the steps in flight
        num_running = Counter(sequence.ticket.request.client for sequence in self.running)
        num_spare = len(self.running) - len(num_running)
        waiting = self.waiting.newcomers(num_running.__getitem__)
        newcomers = islice((each for each in waiting if not self._must_wait(each)), num_coming + num_spare)
        for sequence in who_yields(self.running, sum(1 for _ in newcomers) - num_coming):
            self._preempt(sequence, "another caller ran nothing", is_front=False)

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether the sequence has a block for its next position; preempts the youngest to get one."""
        assert sequence.table is not None
        num_tokens = sequence.num_scheduled + 1
        while not self.blocks.can_extend(sequence.table, num_tokens):
            if self._has_retiring():
                return False  # blocks come back when the steps in flight are done
            youngest = self.running[-1]
            self.num_preemptions += 1
            self._preempt(youngest, "KV blocks ran out")
            if youngest is sequence:
                return False
        self.blocks.extend(sequence.table, num_tokens)
        return True

    def _preempt(self, sequence: Sequence, reason: str, *, is_front: bool = True) -> None:
        """Takes slot and blocks away; the sequence is first in the queue, or else first of its caller's, and will be computed
        again from its tokens."""
        self.running.remove(sequence)
        self.waiting.put_back(sequence, is_front=is_front)
        sequence.move(SequenceState.WAITING)
        sequence.num_preemptions += 1
        logger.info("preempted: %s", reason, extra={"request_id": sequence.ticket.request.request_id})
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Gives slot and blocks back, unless a step in flight still uses them: then `retire` does."""
        if sequence.num_steps_in_flight or sequence.slot is None:
            return
        assert sequence.table is not None
        self.blocks.close(sequence.table)
        self.slots.give_back(sequence.slot)
        sequence.slot = None
        sequence.table = None
