"""Checks that batches keep to the engine's contract, with a model of slots and KV blocks. Every breach is an AssertionError.

It knows which token every block position holds and what stood before it, so that a block handed to two sequences, a prefix
taken from the wrong blocks or a position left out shows at the step that is wrong, not in a garbled text later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hotgraph_server.batch import Batch, EngineInfo, Row, Sampler, SlotAssignment
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine.token_rules import History

_RANK = {Sampler.GREEDY: 0, Sampler.GUMBEL: 1, Sampler.FILTERED: 2}


@dataclass(slots=True)
class _Slot:
    """What the engine would hold for one slot. `marks[i]` stands for token i and all before it."""

    assignment: SlotAssignment
    tokens: list[int]
    marks: list[int]
    table: list[int] = field(default_factory=list)
    next_position: int | None = None  # None: no row since the assignment
    num_sampled: int = 0
    has_failed: bool = False


def _mark(before: int, token_id: int) -> int:
    return hash((before, token_id))


class ContractChecker:
    """A model of an engine of the given sizes. Feed it every batch in order, and the tokens that its rows sampled."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._max_blocks = -(-info.context_length // info.block_size)
        self._slots: dict[int, _Slot] = {}
        self._blocks: dict[int, list[int | None]] = {}  # the marks that stand in a block's positions
        self._last_step: int | None = None

    def check(self, batch: Batch) -> None:
        """Takes in one batch. Raises AssertionError where it breaks the contract; the model is then of no more use."""
        info = self._info
        assert self._last_step is None or batch.step == self._last_step + 1, (
            f"step {batch.step} follows step {self._last_step}"
        )
        self._last_step = batch.step
        assert batch.rows, "a batch has at least one row"
        assert len(batch.rows) <= info.num_slots, f"{len(batch.rows)} rows, {info.num_slots} slots"
        assert batch.num_tokens <= info.max_step_tokens, (
            f"{batch.num_tokens} tokens in a step of {info.max_step_tokens}"
        )
        if batch.num_logprobs is not None:
            assert 0 <= batch.num_logprobs <= BOUNDS.max_logprobs, f"{batch.num_logprobs} log-probabilities"
            assert batch.sampler is Sampler.FILTERED, "log-probabilities need the filtered sampler"
        self._assign(batch.assignments)
        self._append(batch)
        seen: set[int] = set()
        for row in batch.rows:
            assert row.slot not in seen, f"slot {row.slot} has two rows"
            seen.add(row.slot)
            self._check_row(row, batch.sampler)
        self._write(batch.rows)

    def history(self, slot: int) -> History:
        """What the sequence in the slot holds."""
        state = self._slots[slot]
        num_prompt = len(state.assignment.prompt_token_ids)
        return History(
            tuple(state.tokens[:num_prompt]),
            tuple(state.tokens[num_prompt:]),
            state.assignment.sampling,
            state.assignment.seed,
        )

    def banned(self, slot: int) -> tuple[int, ...]:
        """The tokens that may not be sampled next."""
        state = self._slots[slot]
        ban = state.assignment.banned_until
        return ban[1] if ban is not None and len(state.tokens) < ban[0] else ()

    def has_failed(self, slot: int) -> bool:
        return self._slots[slot].has_failed

    def add_sampled(self, slot: int, token_id: int | None) -> None:
        """The last row of the slot sampled this token; None: its logits were not finite."""
        state = self._slots[slot]
        if token_id is None:
            state.has_failed = True
            return
        state.marks.append(_mark(state.marks[-1], token_id))
        state.tokens.append(token_id)
        state.num_sampled += 1

    def _assign(self, assignments: Sequence[SlotAssignment]) -> None:
        info = self._info
        seen: set[int] = set()
        for assignment in assignments:
            slot = assignment.slot
            assert 0 <= slot < info.num_slots, f"no slot {slot}"
            assert slot not in seen, f"slot {slot} is assigned twice in one step"
            seen.add(slot)
            assert 0 <= assignment.seed < 1 << 64, "a seed has 64 bits"
            tokens = [*assignment.prompt_token_ids, *assignment.completion_token_ids]
            assert assignment.prompt_token_ids, f"slot {slot}: no prompt"
            assert all(0 <= token_id < info.vocabulary_size for token_id in tokens), f"slot {slot}: token ids"
            marks: list[int] = []
            before = 0
            for token_id in tokens:
                before = _mark(before, token_id)
                marks.append(before)
            self._slots[slot] = _Slot(assignment, tokens, marks)

    def _append(self, batch: Batch) -> None:
        info = self._info
        for append in batch.block_appends:
            state = self._slots.get(append.slot)
            assert state is not None, f"a block for slot {append.slot}, which is not assigned"
            assert 1 <= append.block < info.num_blocks, f"no block {append.block} (1 to {info.num_blocks - 1})"
            assert append.index == len(state.table), (
                f"slot {append.slot}: block at index {append.index} of a table of {len(state.table)}"
            )
            assert append.index < self._max_blocks, f"slot {append.slot}: more blocks than the context has"
            assert append.block not in state.table, f"slot {append.slot}: block {append.block} twice in its table"
            state.table.append(append.block)

    def _check_row(self, row: Row, sampler: Sampler) -> None:
        info = self._info
        name = f"slot {row.slot}"
        state = self._slots.get(row.slot)
        assert state is not None, f"{name} is not assigned"
        start, end = row.start, row.start + row.num_tokens
        assert row.num_tokens >= 1, f"{name}: no tokens"
        assert end <= info.context_length, f"{name}: position {end - 1} of a context of {info.context_length}"
        if state.next_position is None:
            assert row.token_ids is not None, f"{name}: a decode row right after the assignment"
            assert 0 <= start < len(state.tokens), f"{name}: starts at {start} of {len(state.tokens)} tokens"
        else:
            assert start == state.next_position, f"{name}: position {start} follows {state.next_position - 1}"
        num_known = len(state.tokens) + state.has_failed  # a failed row left a place for the token it did not give
        assert end <= num_known, f"{name}: tokens to {end - 1}, the sequence has {num_known}"
        if row.token_ids is None:
            assert row.num_tokens == 1, f"{name}: a decode row has one token"
            has_sampled = state.num_sampled > 0 or state.has_failed
            assert has_sampled, f"{name}: a decode row before anything was sampled"
            assert end == num_known, f"{name}: a decode row at {start}, the last token stands at {num_known - 1}"
        else:
            assert len(row.token_ids) == row.num_tokens, f"{name}: {len(row.token_ids)} ids for {row.num_tokens} tokens"
            assert list(row.token_ids) == state.tokens[start:end], f"{name}: ids at {start} are not the sequence's"
        if row.is_sampled:
            assert end == num_known, f"{name}: samples in the middle of its tokens"
            self._check_sampler(state, sampler, name)
        num_blocks = -(-end // info.block_size)
        assert num_blocks <= len(state.table), (
            f"{name}: position {end - 1} needs {num_blocks} blocks, the table has {len(state.table)}"
        )
        if not state.has_failed:
            self._check_readable(state, start, name)
        state.next_position = end

    def _check_sampler(self, state: _Slot, sampler: Sampler, name: str) -> None:
        sampling, ban = state.assignment.sampling, state.assignment.banned_until
        needed = Sampler.GREEDY if sampling.is_greedy else Sampler.GUMBEL
        is_banned = ban is not None and len(state.tokens) < ban[0]
        if sampling.has_filters or sampling.has_penalties or sampling.logit_bias or is_banned:
            needed = Sampler.FILTERED
        assert _RANK[sampler] >= _RANK[needed], f"{name} needs the {needed.value} sampler, not {sampler.value}"

    def _check_readable(self, state: _Slot, start: int, name: str) -> None:
        """First and last position before `start` of every block, and all of the last block, hold the sequence's own."""
        size = self._info.block_size
        for index in range(-(-start // size)):
            first, last = index * size, min(start, (index + 1) * size) - 1
            positions = range(first, last + 1) if last == start - 1 else (first, last)
            marks = self._blocks.get(state.table[index])
            assert marks is not None, f"{name}: block {state.table[index]} was never written"
            for position in positions:
                assert marks[position % size] == state.marks[position], (
                    f"{name}: block {state.table[index]} does not hold its position {position}"
                )

    def _write(self, rows: Sequence[Row]) -> None:
        size = self._info.block_size
        writers: dict[int, int] = {}
        for row in rows:
            state = self._slots[row.slot]
            for position in range(row.start, row.start + row.num_tokens):
                block = state.table[position // size]
                other = writers.setdefault(block, row.slot)
                assert other == row.slot, f"slots {other} and {row.slot} both write block {block}"
                marks = self._blocks.setdefault(block, [None] * size)
                marks[position % size] = state.marks[position] if position < len(state.marks) else None
