"""Steps that are filled in ahead of the device, against a plain model of slots: the same checks on the CPU and on a GPU.

Sequences come, grow, and leave their slots to others; what each step must read is kept in lists.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hotgraph_server.batch import Batch, BlockAppend, Row, Sampler, SlotAssignment
from hotgraph_server.engine.buffers import StepBuffers
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.engine.state import StepState
from hotgraph_server.request import SamplingParams

BLOCK_SIZE = 4
MAX_BLOCKS = 9
MAX_ROWS = 6
MAX_TOKENS = 40
NUM_SLOTS = 6
VOCABULARY_SIZE = 100

Run = Callable[[StepState, int, int], None]
"""Queues the work of a step of so many tokens and rows that was filled in: see `work`."""

PARAMETERS = ("temperature", "top_k", "seeds")
RESULTS = {
    "row_slots": "rows",
    "is_sampled": "rows",
    "token_ids": "tokens",
    "positions": "tokens",
    "kv_indices": "tokens",
    "block_tables": "rows",
    "context_lens": "rows",
    "query_starts": "rows + 1",
    "last_indices": "rows",
}
"""What the step buffers hold of a step, and how much of it."""


def make_state(device: torch.device, num_stages: int) -> StepState:
    """Empty, and without an arena."""
    slots = SlotTables(
        num_slots=NUM_SLOTS,
        max_blocks=MAX_BLOCKS,
        vocabulary_size=VOCABULARY_SIZE,
        device=device,
        num_stages=num_stages,
    )
    buffers = StepBuffers(
        slots,
        max_tokens=MAX_TOKENS,
        max_rows=MAX_ROWS,
        max_blocks=MAX_BLOCKS,
        device=device,
        num_stages=num_stages,
    )
    return StepState(slots, buffers, None)


def work(state: StepState, tokens: int, rows: int) -> None:
    """A step without a model: the last tokens become what the rows computed, modulo the vocabulary, and the run is counted."""
    buffers, slots = state.buffers, state.slots
    buffers.prepare(tokens, rows, block_size=BLOCK_SIZE)
    row_slots = buffers.row_slots[:rows]
    chosen = (buffers.token_ids[buffers.last_indices[:rows]] * 3 + buffers.context_lens[:rows]) % VOCABULARY_SIZE
    kept = slots.last_tokens[row_slots]
    slots.last_tokens.index_copy_(0, row_slots, torch.where(buffers.is_sampled[:rows] != 0, chosen, kept))
    buffers.counter.add_(1)


@dataclass
class _Sequence:
    """One that holds a slot: what the host says of it, and what the device must hold."""

    assignment: SlotAssignment
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    last: int = 0
    has_sampled: bool = False


@dataclass
class _Expected:
    """Of one step: results by name, and the tables and parameters of its rows' slots."""

    results: dict[str, list[int] | list[list[int]]]
    tables: dict[int, list[int]]
    parameters: dict[int, list[float | int | list[int]]]


class Sequences:
    """Draws batches, and says what they must come to."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._held: dict[int, _Sequence] = {}

    def next(self, step: int, shape: tuple[int, int] | None = None) -> tuple[Batch, int, int, _Expected]:
        """A batch, the tokens and rows of its shape, which is drawn unless given, and what the step must give."""
        rng = self._rng
        most_rows = MAX_ROWS if shape is None else shape[1]
        slots = rng.sample(range(NUM_SLOTS), rng.randint(1, most_rows))
        # Some change that have no row, and must not be forgotten.
        touched = [*slots, *(slot for slot in range(NUM_SLOTS) if slot not in slots and rng.random() < 0.3)]
        assignments = [self._assign(slot) for slot in touched if slot not in self._held or rng.random() < 0.2]
        left = (MAX_TOKENS if shape is None else shape[0]) - len(slots)
        rows: list[Row] = []
        for slot in slots:
            sequence = self._held[slot]
            if sequence.num_tokens + 1 > MAX_BLOCKS * BLOCK_SIZE:
                assignments.append(self._assign(slot))
                sequence = self._held[slot]
            length = 1
            if not sequence.has_sampled or rng.random() < 0.2:
                length = rng.randint(1, min(left + 1, MAX_BLOCKS * BLOCK_SIZE - sequence.num_tokens))
                left -= length - 1
            is_last = length == 1 and sequence.has_sampled
            token_ids = None if is_last else [rng.randrange(VOCABULARY_SIZE) for _ in range(length)]
            rows.append(Row(slot, sequence.num_tokens, length, token_ids, is_sampled=rng.random() < 0.8))
        appends = [append for slot in touched for append in self._grow(slot, rows)]
        batch = Batch(step, rows, assignments, appends, sampler=rng.choice(list(Sampler)))
        tokens, num_rows = shape or (
            rng.randint(batch.num_tokens, MAX_TOKENS),
            rng.randint(len(rows), MAX_ROWS),
        )
        return batch, tokens, num_rows, self._run(rows, tokens, num_rows)

    def _assign(self, slot: int) -> SlotAssignment:
        rng = self._rng
        sampling = SamplingParams(rng.choice([0.0, 0.5, 1.25]), top_k=rng.randrange(90))
        assignment = SlotAssignment(slot, sampling, rng.getrandbits(64), (1,), ())
        self._held[slot] = _Sequence(assignment)
        return assignment

    def _grow(self, slot: int, rows: list[Row]) -> list[BlockAppend]:
        """The blocks that the slot's row needs, and now and then more."""
        sequence = self._held.get(slot)
        if sequence is None:
            return []
        end = sequence.num_tokens + sum(row.num_tokens for row in rows if row.slot == slot)
        num_blocks = min(MAX_BLOCKS, max(-(-end // BLOCK_SIZE), len(sequence.blocks)) + self._rng.choice([0, 0, 1]))
        appends = []
        while len(sequence.blocks) < num_blocks:
            block = self._rng.randrange(1, 1000)
            appends.append(BlockAppend(slot, len(sequence.blocks), block))
            sequence.blocks.append(block)
        return appends

    def _run(self, rows: list[Row], tokens: int, num_rows: int) -> _Expected:
        ordered = sorted(rows, key=lambda row: row.num_tokens != 1)
        token_ids, positions, kv_indices, ends = [], [], [], [0]
        for row in ordered:
            sequence = self._held[row.slot]
            given = [sequence.last] if row.token_ids is None else list(row.token_ids)
            for position, token_id in enumerate(given, row.start):
                token_ids.append(token_id)
                positions.append(position)
                kv_indices.append(sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            ends.append(len(token_ids))
            sequence.num_tokens += row.num_tokens
            if row.is_sampled:
                sequence.last = (given[-1] * 3 + sequence.num_tokens) % VOCABULARY_SIZE
                sequence.has_sampled = True
        num_padding, padding = tokens - len(token_ids), num_rows - len(rows)
        tables = {
            row.slot: self._held[row.slot].blocks + [0] * (MAX_BLOCKS - len(self._held[row.slot].blocks))
            for row in ordered
        }
        results: dict[str, list[int] | list[list[int]]] = {
            "row_slots": [row.slot for row in ordered] + [NUM_SLOTS] * padding,
            "is_sampled": [int(row.is_sampled) for row in ordered] + [0] * padding,
            "token_ids": token_ids + [0] * num_padding,
            "positions": positions + [0] * num_padding,
            "kv_indices": kv_indices + [0] * num_padding,
            "block_tables": [tables[row.slot] for row in ordered] + [[0] * MAX_BLOCKS] * padding,
            "context_lens": [row.start + row.num_tokens for row in ordered] + [0] * padding,
            "query_starts": ends + ends[-1:] * padding,
            "last_indices": [end - 1 for end in ends[1:]] + [ends[-1] - 1] * padding,
        }
        parameters: dict[int, list[float | int | list[int]]] = {}
        for row in ordered:
            assignment = self._held[row.slot].assignment
            halves = [assignment.seed & 0xFFFFFFFF, assignment.seed >> 32]
            parameters[row.slot] = [assignment.sampling.temperature, assignment.sampling.top_k, halves]
        return _Expected(results, tables, parameters)


def check_steps(
    device: torch.device,
    *,
    seed: int,
    num_steps: int,
    num_ahead: int,
    run: Run = work,
    shape: tuple[int, int] | None = None,
) -> None:
    """Up to `num_ahead` steps more than are over are filled in before the next one runs, on the CPU; a GPU runs them when it
    comes to it. There are no more stages than that takes. What a step gave is copied behind it and compared at the end.
    """
    rng = random.Random(seed)
    sequences, state = Sequences(rng), make_state(device, num_ahead + 1)
    is_cuda = device.type == "cuda"
    waiting: list[Callable[[], None]] = []
    over: list[torch.cuda.Event] = []
    found: list[tuple[_Expected, dict[str, torch.Tensor]]] = []

    def launch(tokens: int, rows: int, expected: _Expected) -> None:
        run(state, tokens, rows)
        sizes = {"tokens": tokens, "rows": rows, "rows + 1": rows + 1}
        copies = {name: getattr(state.buffers, name)[: sizes[size]].clone() for name, size in RESULTS.items()}
        for name in ("block_tables", *PARAMETERS):
            copies[f"slots.{name}"] = getattr(state.slots, name).clone()
        found.append((expected, copies))

    for step in range(num_steps):
        batch, tokens, rows, expected = sequences.next(step, shape)
        state.fill(batch, rows)
        assert state.buffers.note_run() == step
        if is_cuda:
            launch(tokens, rows, expected)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            over.append(event)
            if len(over) > num_ahead:
                over.pop(0).synchronize()
        else:
            waiting.append(lambda tokens=tokens, rows=rows, expected=expected: launch(tokens, rows, expected))  # type: ignore[misc]
            while len(waiting) > rng.randint(0, num_ahead):
                waiting.pop(0)()
    for one in waiting:
        one()

    for step, (expected, copies) in enumerate(found):
        for name in RESULTS:
            assert copies[name].tolist() == expected.results[name], f"{name} of step {step}"
        for slot, table in expected.tables.items():
            assert copies["slots.block_tables"][slot].tolist() == table, f"slot {slot} in step {step}"
            parameters = [copies[f"slots.{name}"][slot].tolist() for name in PARAMETERS]
            assert parameters == expected.parameters[slot], f"slot {slot} in step {step}"
    assert len(found) == num_steps
