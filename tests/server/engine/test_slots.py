"""Slot tables hold what an assignment says, and nothing of what was there before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hotgraph_server.batch import Batch, BlockAppend, Row, SlotAssignment
from hotgraph_server.engine.buffers import StepBuffers
from hotgraph_server.engine.slots import MAX_BANNED, SlotTables
from hotgraph_server.request import SamplingParams

FULL = SamplingParams(
    temperature=0.5,
    top_k=7,
    top_p=0.75,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    logit_bias={3: 2.0, 9: -4.0},
)


CPU = torch.device("cpu")


def make() -> tuple[SlotTables, Callable[[int], None]]:
    """Three slots of four blocks, 20 tokens; and what runs the first work of a step with a row in a slot."""
    slots = SlotTables(num_slots=3, max_blocks=4, vocabulary_size=20, device=CPU)
    buffers = StepBuffers(slots, max_tokens=1, max_rows=1, max_blocks=4, device=CPU)

    def step(slot: int) -> None:
        buffers.fill(Batch(0, [Row(slot, 0, 1, [7], True)]), 1)
        buffers.prepare(1, 1, block_size=4)

    return slots, step


def test_assignment_is_written_to_its_slot_only() -> None:
    """All parameters, both halves of the seed, bias, bans and counts stand in the slot; the other slots are neutral."""
    slots, step = make()
    slots.assign([SlotAssignment(1, FULL, (5 << 32) + 6, (1, 2, 2), (2, 4, 4), (9, (0, 11)))])
    step(1)
    floats = (slots.temperature, slots.top_p, slots.min_p, slots.repetition, slots.presence, slots.frequency)
    assert [tensor[1].item() for tensor in floats] == [0.5, 0.75, 0.25, 1.5, 0.5, -0.5]
    assert [tensor[0].item() for tensor in floats] == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert (slots.top_k[1].item(), slots.seeds[1].tolist()) == (7, [6, 5])
    assert slots.bias_ids[1, :3].tolist() == [3, 9, 0]
    assert slots.bias_values[1, :3].tolist() == [2.0, -4.0, 0.0]
    assert slots.banned_until[1].item() == 9
    assert slots.banned_ids[1, :3].tolist() == [0, 11, -1]
    assert slots.in_prompt[1].nonzero().flatten().tolist() == [1, 2]
    assert {i: n for i, n in enumerate(slots.counts[1].tolist()) if n} == {2: 1, 4: 2}
    assert not slots.counts[[0, 2, 3, 4]].any()
    assert (slots.penalised, slots.biased, slots.banned) == ({1}, {1}, {1: 9})


def test_next_assignment_forgets_everything() -> None:
    """After a plain assignment the slot has no table, bias, ban or penalty left, and later counts start again."""
    slots, step = make()
    slots.assign([SlotAssignment(1, FULL, 1, (1, 2), (3, 4), (9, (0, 11)))])
    slots.append_blocks([BlockAppend(1, 0, 8), BlockAppend(1, 1, 9)])
    step(1)
    assert slots.block_tables[1].tolist() == [8, 9, 0, 0]
    slots.assign([SlotAssignment(1, SamplingParams(temperature=0.0), 0, (5,), ())])
    step(1)
    assert slots.block_tables[1].tolist() == [0, 0, 0, 0]
    assert not slots.bias_values[1].any()
    assert not slots.bias_ids[1].any()
    assert bool((slots.banned_ids[1] == -1).all())
    assert (slots.banned_until[1].item(), slots.temperature[1].item(), slots.repetition[1].item()) == (0, 0.0, 1.0)
    assert (slots.penalised, slots.biased, slots.banned) == (set(), set(), {})
    slots.assign([SlotAssignment(1, FULL, 1, (5,), ())])
    assert slots.in_prompt[1].nonzero().flatten().tolist() == [5]
    assert not slots.counts[1].any()


def test_too_many_bans_are_refused() -> None:
    """More banned tokens than there is room for is a ValueError, not a ban left out."""
    with pytest.raises(ValueError, match="banned"):
        make()[0].assign([SlotAssignment(0, FULL, 1, (1,), (), (5, tuple(range(MAX_BANNED + 1))))])


def test_what_changed_waits_for_a_step_with_the_slot() -> None:
    """A step tells the device of its own slots only; what was said of others meanwhile adds up until their step comes."""
    slots, step = make()
    slots.assign([SlotAssignment(1, FULL, 7, (1,), ()), SlotAssignment(2, FULL, 8, (1,), ())])
    slots.append_blocks([BlockAppend(1, 0, 8)])
    step(2)
    assert slots.block_tables[1].tolist() == [0, 0, 0, 0]
    assert (slots.temperature[1].item(), slots.temperature[2].item()) == (0.0, 0.5)
    assert [held.is_changed for held in slots.held] == [False, True, False, False, False]
    slots.append_blocks([BlockAppend(1, 1, 9), BlockAppend(1, 2, 5)])
    step(1)
    assert slots.block_tables[1].tolist() == [8, 9, 5, 0]
    assert (slots.temperature[1].item(), slots.seeds[1].tolist()) == (0.5, [7, 0])
    slots.append_blocks([BlockAppend(1, 3, 6), BlockAppend(1, 1, 7)])
    step(1)
    assert slots.block_tables[1].tolist() == [8, 7, 5, 6]
    assert not any(held.is_changed for held in slots.held)


def test_a_block_table_has_no_gaps() -> None:
    """A block behind entries that nobody gave is an IndexError, not a table with something else between."""
    slots, _ = make()
    slots.append_blocks([BlockAppend(0, 0, 8)])
    with pytest.raises(IndexError):
        slots.append_blocks([BlockAppend(0, 2, 9)])


def test_a_slot_that_was_never_assigned_is_neutral() -> None:
    """Rows of padding and of a warm-up are greedy, and nothing changes their logits."""
    slots, _ = make()
    neutral = {"temperature": 0, "top_p": 1, "min_p": 0, "repetition": 1, "presence": 0, "frequency": 0, "top_k": 0}
    for name, value in neutral.items():
        assert set(getattr(slots, name).tolist()) == {value}, name
