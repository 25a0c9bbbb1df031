"""Tests of scheduler/planner.py."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotgraph_server.batch import Phase, Sampler
from hotgraph_server.request import GraphMode, GraphPolicy, Request, SamplingParams, StopParams
from hotgraph_server.scheduler.blocks import BlockManager
from hotgraph_server.scheduler.planner import Plan, Planner
from hotgraph_server.scheduler.sequence import Sequence, SequenceState
from hotgraph_server.scheduler.slots import SlotPool
from hotgraph_server.scheduler.ticket import Ticket
from hotgraph_server.text import ByteTokenizer

GREEDY = SamplingParams(temperature=0.0)


def make_planner(
    *,
    num_slots: int = 4,
    num_blocks: int = 33,
    block_size: int = 4,
    max_step_tokens: int = 16,
    takes_back: bool = False,
) -> Planner:
    return Planner(
        SlotPool(num_slots),
        BlockManager(num_blocks, block_size),
        max_step_tokens=max_step_tokens,
        shares_prefixes=True,
        may_start=lambda _: True,
        takes_back=takes_back,
    )


def add(planner: Planner, prompt: list[int], max_tokens: int = 8, **changes: object) -> list[Sequence]:
    fields: dict[str, object] = {"sampling": GREEDY} | changes
    request = Request("r", tuple(prompt), max_tokens, **fields)  # type: ignore[arg-type]
    ticket = Ticket(request, ByteTokenizer(), 0.0, lambda _: None)
    for sequence in ticket.sequences:
        planner.add(sequence)
    return ticket.sequences


def complete(planner: Planner, plan: Plan, token_id: int = 65) -> None:
    """What the scheduler does when a step is done: every sampled row gives the same token."""
    for row, sequence in zip(plan.batch.rows, plan.sequences, strict=True):
        planner.retire(sequence, row)
        if sequence.is_finished:
            continue
        if row.is_sampled:
            sequence.accept(token_id)
            sequence.time_token(0.0)
        planner.commit(sequence)
        if sequence.finish is not None:
            planner.finish(sequence)


def plan(planner: Planner) -> Plan:
    planned = planner.plan()
    assert planned is not None
    return planned


def test_a_prompt_is_cut_into_chunks_and_the_last_is_sampled() -> None:
    """A prompt longer than a step runs in several; only its last chunk samples; then it decodes."""
    planner = make_planner(max_step_tokens=6)
    (sequence,) = add(planner, list(range(10)))
    first = plan(planner)
    assert [(r.start, r.num_tokens, r.is_sampled) for r in first.batch.rows] == [(0, 6, False)]
    assert first.batch.phase is Phase.PREFILL
    complete(planner, first)
    second = plan(planner)
    assert [(r.start, r.num_tokens, r.is_sampled) for r in second.batch.rows] == [(6, 4, True)]
    assert list(second.batch.rows[0].token_ids or ()) == [6, 7, 8, 9]
    complete(planner, second)
    third = plan(planner)
    assert (third.batch.phase, third.batch.rows[0].token_ids, third.batch.rows[0].start) == (Phase.DECODE, None, 10)
    assert sequence.state is SequenceState.DECODE


def test_decode_rows_come_before_prompts_in_a_mixed_step() -> None:
    """A running stream takes part in every step; a new prompt gets what room is left."""
    planner = make_planner(max_step_tokens=8)
    add(planner, [1, 2, 3])
    complete(planner, plan(planner))
    add(planner, list(range(20)))
    mixed = plan(planner)
    assert mixed.batch.phase is Phase.MIXED
    assert [row.num_tokens for row in mixed.batch.rows] == [1, 7]


def test_the_engine_is_told_of_each_block_once_and_of_the_slot() -> None:
    """Assignment and first blocks come with the first step, later blocks when positions reach them."""
    planner = make_planner(block_size=4)
    add(planner, [1, 2, 3], max_tokens=6)
    first = plan(planner)
    assert [assignment.slot for assignment in first.batch.assignments] == [0]
    assert [(a.slot, a.index) for a in first.batch.block_appends] == [(0, 0)]
    complete(planner, first)
    second = plan(planner)  # writes position 3, the last of block 0
    assert not second.batch.assignments
    assert not second.batch.block_appends
    complete(planner, second)
    assert [(a.slot, a.index) for a in plan(planner).batch.block_appends] == [(0, 1)]


def test_max_tokens_bounds_what_is_sampled_ahead() -> None:
    """With steps in flight no more tokens are sampled than max_tokens, so length never needs to be cut."""
    planner = make_planner()
    add(planner, [1, 2], max_tokens=2)
    in_flight = [plan(planner), plan(planner)]
    assert planner.plan() is None
    for step in in_flight:
        complete(planner, step)
    assert planner.slots.num_used == 0
    assert planner.blocks.num_used == 0


def test_a_finished_sequence_keeps_its_place_until_its_last_step_is_done() -> None:
    """Slot and blocks are not handed on while a step in flight still writes to them."""
    planner = make_planner(num_slots=1)
    (sequence,) = add(planner, [1, 2])
    first, second = plan(planner), plan(planner)
    complete(planner, first, token_id=256)  # end of text: the second step runs for nothing
    assert sequence.is_finished
    assert (planner.slots.num_used, planner.blocks.num_used) == (1, 1)
    add(planner, [3, 4])
    assert planner.plan() is None
    complete(planner, second)
    assert (planner.slots.num_used, planner.blocks.num_used) == (0, 0)
    assert planner.plan() is not None


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back() -> None:
    """Pre-emption takes the youngest; it is first in the queue and is computed again from all its tokens."""
    planner = make_planner(num_blocks=5, block_size=2, max_step_tokens=16)
    (old,) = add(planner, [1, 2, 3], max_tokens=5)
    (young,) = add(planner, [4, 5], max_tokens=5)
    complete(planner, plan(planner))
    complete(planner, plan(planner))
    while young.state is not SequenceState.WAITING:
        complete(planner, plan(planner))
    assert (old.state, young.num_preemptions, planner.num_preemptions) == (SequenceState.DECODE, 1, 1)
    known = list(young.token_ids)
    while not old.is_finished:
        complete(planner, plan(planner))
    again = plan(planner)
    assert again.sequences == [young]
    row = again.batch.rows[0]
    assert list(row.token_ids or ()) == known[row.start :]
    assert again.batch.assignments[0].completion_token_ids == tuple(known[2:])


def test_later_choices_wait_for_the_first_and_share_its_blocks() -> None:
    """Choices of one prompt compute it once."""
    planner = make_planner(block_size=4)
    sequences = add(planner, list(range(9)), num_choices=3)
    first = plan(planner)
    assert first.sequences == sequences[:1]
    complete(planner, first)
    second = plan(planner)
    assert [row.num_tokens for row in second.batch.rows] == [1, 1, 1]  # a decode row and twice the last prompt token
    assert [s.num_cached_tokens for s in sequences] == [0, 8, 8]


def test_those_who_wait_for_graphs_hold_up_nobody() -> None:
    """A sequence that may wait is passed by others and keeps its place in the queue."""
    waits = True
    planner = Planner(
        SlotPool(2),
        BlockManager(33, 4),
        max_step_tokens=16,
        shares_prefixes=True,
        may_start=lambda sequence: not (waits and sequence.ticket.request.graph_policy.mode is GraphMode.WAIT_UP_TO),
    )
    (first,) = add(planner, [1], graph_policy=GraphPolicy(GraphMode.WAIT_UP_TO, 1.0))
    (second,) = add(planner, [2])
    assert plan(planner).sequences == [second]
    assert list(planner.waiting) == [first]
    waits = False
    assert first in plan(planner).sequences


def test_the_step_can_do_what_its_most_demanding_row_needs() -> None:
    """Sampler, log-probabilities and eagerness are those of the rows that sample."""
    planner = make_planner(max_step_tokens=32)
    add(planner, [1])
    assert plan(planner).batch.sampler is Sampler.GREEDY
    add(planner, [2], sampling=SamplingParams(temperature=0.7))
    assert plan(planner).batch.sampler is Sampler.GUMBEL
    add(planner, [3], num_logprobs=2)
    batch = plan(planner).batch
    assert (batch.sampler, batch.num_logprobs, batch.is_eager) == (Sampler.FILTERED, 2, False)
    add(planner, [4], stop=StopParams(min_tokens=1), graph_policy=GraphPolicy(GraphMode.EAGER_ONLY))
    assert plan(planner).batch.is_eager


def test_finishing_a_waiting_sequence_takes_it_from_the_queue() -> None:
    """A request that is cancelled before it runs never runs."""
    planner = make_planner()
    (sequence,) = add(planner, [1])
    planner.finish(sequence)
    assert planner.plan() is None
    assert sequence.is_finished


def start(planner: Planner, client: str, num: int = 1) -> list[Sequence]:
    """That many of a caller run, one token further than their prompts."""
    sequences = [add(planner, [1, 2], client=client)[0] for _ in range(num)]
    complete(planner, plan(planner))
    return sequences


def test_a_newcomer_takes_the_slot_of_who_runs_most() -> None:
    """The newest of theirs yields, once its steps are done, and goes on later with the tokens it has, before others of its
    caller; who runs something already takes nothing."""
    planner = make_planner(num_slots=3, takes_back=True)
    oldest, older, newest = start(planner, "greedy", 3)
    (queued,) = add(planner, [7], client="greedy")
    ahead = plan(planner)
    assert newest in ahead.sequences
    (modest,) = add(planner, [3, 4], client="modest")
    (second,) = add(planner, [5, 6], client="modest")
    during = plan(planner)
    assert during.sequences == [oldest, older]
    assert newest.state is SequenceState.WAITING
    complete(planner, ahead)
    assert newest.token_ids == [1, 2, 65, 65], "what was sampled meanwhile counts"
    complete(planner, during)
    after = plan(planner)
    assert after.sequences == [oldest, older, modest]
    complete(planner, after)
    assert (newest.num_preemptions, planner.num_preemptions) == (1, 0)
    planner.finish(older)
    again = plan(planner)
    assert again.sequences == [oldest, modest, newest], "one each, and its caller's turn is longer ago"
    assert list(again.batch.rows[2].token_ids or ()) == [1, 2, 65, 65]
    assert list(planner.waiting) == [second, queued]


def test_nothing_is_taken_back_unless_that_is_set() -> None:
    """By default a newcomer waits."""
    planner = make_planner(num_slots=2)
    running = start(planner, "greedy", 2)
    add(planner, [3, 4], client="modest")
    assert plan(planner).sequences == running
    assert not any(sequence.num_preemptions for sequence in running)


def test_callers_who_run_one_each_keep_it() -> None:
    """However many newcomers wait, no slot goes round; and no more slots are taken than there are newcomers."""
    planner = make_planner(num_slots=4, takes_back=True)
    running = start(planner, "a") + start(planner, "b") + start(planner, "c", 2)
    for client in "defg":
        add(planner, [3, 4], client=client)
    complete(planner, plan(planner))
    assert [sequence.state for sequence in running] == [SequenceState.DECODE] * 3 + [SequenceState.WAITING]
    complete(planner, plan(planner))
    assert sum(sequence.num_preemptions for sequence in running) == 1


def test_who_may_not_start_takes_nothing() -> None:
    """A newcomer that waits for its graphs is no reason to take a slot back."""
    planner = make_planner(num_slots=2, takes_back=True)
    running = start(planner, "greedy", 2)
    planner._may_start = lambda _: False
    add(planner, [3, 4], client="modest")
    assert plan(planner).sequences == running
    assert not any(sequence.num_preemptions for sequence in running)


def test_nothing_is_taken_back_while_blocks_are_short() -> None:
    """Who had to give way for blocks would have the slot, so newcomers take none until that one is back."""
    planner = make_planner(num_slots=3, num_blocks=6, block_size=2, takes_back=True)
    running = start(planner, "greedy", 3)
    while not planner.waiting:
        complete(planner, plan(planner))
    assert (planner.num_preemptions, len(planner.running)) == (1, 2)
    for client in "ab":
        add(planner, [3, 4], client=client)
    complete(planner, plan(planner))
    assert sum(sequence.num_preemptions for sequence in running) == 1


class PlannerMachine(RuleBasedStateMachine):
    """Requests come, leave and finish in any order, with and without running ahead, in a pool that is too small."""

    @initialize(run_ahead=st.integers(0, 2), takes_back=st.booleans())
    def begin(self, run_ahead: int, takes_back: bool) -> None:
        self.run_ahead = run_ahead
        self.planner = make_planner(num_slots=3, num_blocks=9, block_size=2, max_step_tokens=5, takes_back=takes_back)
        self.in_flight: deque[Plan] = deque()
        self.sequences: list[Sequence] = []
        self.written: dict[
            int, list[int | None]
        ] = {}  # slot -> tokens at its positions; None where only the device knows
        self.tables: dict[int, list[int]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        max_tokens=st.integers(1, 8),
        client=st.sampled_from("aaab"),
    )
    def submit(self, prompt: list[int], max_tokens: int, client: str) -> None:
        num_choices = 2 if len(prompt) == 4 else 1
        self.sequences += add(self.planner, prompt, max_tokens, num_choices=num_choices, client=client)

    @precondition(lambda self: len(self.in_flight) <= self.run_ahead)
    @rule()
    def step(self) -> None:
        planned = self.planner.plan()
        if planned is None:
            # Nothing in flight and nothing to do: then nobody waits.
            assert self.in_flight or not self.planner.waiting
            return
        batch = planned.batch
        assert batch.num_tokens <= 5
        slots = [row.slot for row in batch.rows]
        assert len(set(slots)) == len(slots)
        for assignment in batch.assignments:
            self.tables[assignment.slot] = []
            self.written[assignment.slot] = [*assignment.prompt_token_ids, *assignment.completion_token_ids]
        for append in batch.block_appends:
            assert len(self.tables[append.slot]) == append.index
            self.tables[append.slot].append(append.block)
        for row, sequence in zip(batch.rows, planned.sequences, strict=True):
            assert sequence.slot == row.slot
            assert row.start + row.num_tokens <= len(self.tables[row.slot]) * 2
            assert sequence.table is not None
            assert sequence.table.blocks == self.tables[row.slot]
            if row.token_ids is not None:
                assert list(row.token_ids) == sequence.token_ids[row.start : row.start + row.num_tokens]
        self.in_flight.append(planned)

    @precondition(lambda self: self.in_flight)
    @rule(token_id=st.sampled_from([0, 1, 256]))
    def retire(self, token_id: int) -> None:
        complete(self.planner, self.in_flight.popleft(), token_id)

    @precondition(lambda self: any(not s.is_finished for s in self.sequences))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.planner.finish(data.draw(st.sampled_from([s for s in self.sequences if not s.is_finished])))

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "planner"):
            return
        planner = self.planner
        for sequence in self.sequences:
            assert sequence.num_completion_tokens + sequence.num_samples_in_flight <= sequence.ticket.request.max_tokens
            if sequence.is_finished and not sequence.num_steps_in_flight:
                assert sequence.slot is None
                assert sequence.table is None
        holders = [s for s in self.sequences if s.slot is not None]
        assert planner.slots.num_used == len(holders)
        assert planner.blocks.num_used == len({b for s in holders if s.table for b in s.table.blocks})

    def teardown(self) -> None:
        """Left alone, everything finishes and every slot and block is free again."""
        if not hasattr(self, "planner"):
            return
        for _ in range(2000):
            if self.in_flight:
                complete(self.planner, self.in_flight.popleft(), 0)
            planned = self.planner.plan()
            if planned is not None:
                self.in_flight.append(planned)
            elif not self.in_flight:
                break
        assert all(sequence.is_finished for sequence in self.sequences)
        assert (self.planner.slots.num_used, self.planner.blocks.num_used) == (0, 0)


TestPlannerMachine = PlannerMachine.TestCase
TestPlannerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
