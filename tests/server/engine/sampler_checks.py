"""A step's sampling in the plain samplers' kernels against torch's operations: the same checks interpreted and on a GPU.

A check runs steps of one kind after another over two states that start alike, and compares all that either writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from hotgraph_server.batch import Batch, Row, Sampler, SlotAssignment
from hotgraph_server.engine.buffers import ALL_WORK, StepBuffers
from hotgraph_server.engine.sampler import sample_step
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.engine.state import StepState
from hotgraph_server.request import SamplingParams
from tests.server.kernels.sample_checks import draw_logits

DEPTH = 3
NUM_STEPS = 5
MAX_TOKENS_A_ROW = 3
MAX_BLOCKS = 4
BLOCK_SIZE = 256  # so that few blocks hold 1000 tokens

Run = Callable[[torch.Tensor, StepState, Sampler], None]


def make_state(num_slots: int, max_rows: int, vocabulary_size: int, device: torch.device) -> StepState:
    """Empty, and without an arena."""
    slots = SlotTables(
        num_slots=num_slots, max_blocks=MAX_BLOCKS, vocabulary_size=vocabulary_size, device=device, num_stages=DEPTH
    )
    buffers = StepBuffers(
        slots,
        max_tokens=MAX_TOKENS_A_ROW * max_rows,
        max_rows=max_rows,
        max_blocks=MAX_BLOCKS,
        device=device,
        num_stages=DEPTH,
    )
    return StepState(slots, buffers, None)


def draw_batch(rng: random.Random, step: int, num_rows: int, num_slots: int, sampler: Sampler) -> Batch:
    """Rows of one token and of more, sampled or not, anywhere in their sequences, greedy ones among them; slots in any order.

    The first step assigns all slots, later ones a few.
    """
    rows = []
    for slot in rng.sample(range(num_slots), num_rows):
        length = rng.choice([1, 1, 1, MAX_TOKENS_A_ROW])
        rows.append(Row(slot, rng.randrange(1000), length, [5] * length, is_sampled=rng.random() < 0.8))
    assigned = range(num_slots) if step == 0 else rng.sample(range(num_slots), num_slots // 4)
    assignments = [
        SlotAssignment(
            slot, SamplingParams(rng.choice([0.0, 0.4, 0.8, 1.0, 1.9]), top_k=50), rng.getrandbits(64), (1,), ()
        )
        for slot in assigned
    ]
    return Batch(step, rows, assignments, sampler=sampler)


def fill(state: StepState, batch: Batch, rows: int) -> None:
    """As before a step's sampling."""
    state.fill(batch, rows)
    state.buffers.prepare(MAX_TOKENS_A_ROW * rows, rows, block_size=BLOCK_SIZE)


def run_eagerly(logits: torch.Tensor, state: StepState, sampler: Sampler) -> None:
    """All that a graph of a fixed shape does after the forward."""
    sample_step(logits, state.buffers, sampler, ALL_WORK)


def check_sample_step(
    num_rows: int,
    vocabulary_size: int,
    device: torch.device,
    sampler: Sampler,
    *,
    seed: int,
    max_rows: int | None = None,
    run: Run = run_eagerly,
) -> None:
    """`num_rows` rows of which some are padding. A step of the filtered sampler comes between those that have kernels."""
    rng = random.Random(seed)
    max_rows = num_rows + 1 if max_rows is None else max_rows
    num_slots = max_rows
    found, expected = (make_state(num_slots, max_rows, vocabulary_size, device) for _ in range(2))
    found.buffers.plain = found.buffers.plain_sampling()
    expected.buffers.plain = None
    _, blocks = found.buffers.plain
    num_padding = rng.randint(0, num_rows // 3)
    for step in range(NUM_STEPS):
        current = Sampler.FILTERED if step == 2 else sampler
        batch = draw_batch(rng, step, num_rows - num_padding, num_slots, current)
        logits = draw_logits(rng, num_rows, vocabulary_size, torch.float32, device)
        before = logits.clone()
        for state in (found, expected):
            fill(state, batch, num_rows)
        run(logits, found, current)
        run_eagerly(logits, expected, current)
        numbers = [state.buffers.note_run() for state in (found, expected)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert numbers == [step, step]
        # Only the kernels write it: they ran in each step but the filtered one.
        assert blocks.number.item() == (1 if step == 2 else step)
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
        assert_same(found, expected)
        results = [state.buffers.results(step, num_rows).token_ids for state in (found, expected)]
        assert results[0] == results[1]
        is_finite = torch.isfinite(logits.amax(dim=1)).tolist()
        assert [token_id >= 0 for token_id in results[0]] == is_finite


def assert_same(found: StepState, expected: StepState) -> None:
    """To the bit. What stands in the scratch slot is nobody's last token."""
    scratch_slot = expected.slots.scratch_slot
    pairs = {
        "ring_ids": (found.buffers.ring_ids, expected.buffers.ring_ids),
        "ring_values": (found.buffers.ring_values, expected.buffers.ring_values),
        "counter": (found.buffers.counter, expected.buffers.counter),
        "values": (found.buffers.values, expected.buffers.values),
        "last_tokens": (found.slots.last_tokens[:scratch_slot], expected.slots.last_tokens[:scratch_slot]),
        "counts": (found.slots.counts, expected.slots.counts),
    }
    for name, (one, other) in pairs.items():
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {one} for {other}")
