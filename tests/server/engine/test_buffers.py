"""Step buffers: how a step is laid out, and whose results are read."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.batch import Batch, Row, SlotAssignment
from hotgraph_server.engine.buffers import RunLostError, StepBuffers
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.kernels.prepare_stage import IS_NEW, IS_SAMPLED
from hotgraph_server.kernels.ring import write_ring
from hotgraph_server.request import SamplingParams

CPU = torch.device("cpu")


def make(num_stages: int = 2) -> tuple[StepBuffers, SlotTables]:
    """Eight tokens of four rows."""
    slots = SlotTables(num_slots=4, max_blocks=4, vocabulary_size=20, device=CPU)
    return StepBuffers(slots, max_tokens=8, max_rows=4, max_blocks=4, device=CPU, num_stages=num_stages), slots


def test_a_step_is_laid_out_as_the_kernels_take_it() -> None:
    """Rows of one token come first; the host knows lengths and order of the rows, without padding."""
    buffers, slots = make()
    rows = [Row(2, 5, 3, [7, 8, 9], False), Row(0, 8, 1, None, True), Row(3, 0, 1, [6], True)]
    slots.last_tokens[0] = 4
    step = buffers.fill(Batch(step=0, rows=rows), 4)
    buffers.prepare(7, 4, block_size=4)
    assert (step.num_tokens, step.num_rows, step.num_decode_rows) == (5, 3, 2)
    assert (step.query_lens, step.context_lens, list(step.order)) == ([1, 1, 3], [9, 1, 8], [1, 2, 0])
    assert buffers.row_slots[:4].tolist() == [0, 3, 2, slots.scratch_slot]
    assert buffers.is_sampled[:4].tolist() == [1, 1, 0, 0]
    assert buffers.token_ids[:7].tolist() == [4, 6, 7, 8, 9, 0, 0]
    assert buffers.positions[:7].tolist() == [8, 0, 5, 6, 7, 0, 0]
    assert buffers.query_starts[:5].tolist() == [0, 1, 2, 5, 5]


def test_rows_of_one_slot_all_see_what_is_new_of_it() -> None:
    """As in the verification of a graph, whose rows share a slot that each of its steps assigns."""
    buffers, slots = make()
    for blocks in ([3, 1], [2]):
        slots.assign([SlotAssignment(1, SamplingParams(temperature=0.5), 9, (1,), ())])
        slots.set_blocks(1, blocks)
        rows = [Row(1, start, 2, [5, 6], True) for start in (0, 2)]
        buffers.fill(Batch(step=0, rows=rows), 3)
        stages = buffers._stages
        records = stages.layout.records(stages.tensor)[buffers.num_runs % 2, :2]
        # Each for itself: on a GPU no row waits for another to have told the slot.
        assert records[:, 4:].tolist() == [[IS_SAMPLED | IS_NEW, 0, 0, len(blocks)]] * 2
        buffers.prepare(6, 3, block_size=4)
        write_ring(buffers.ring_ids, buffers.ring_values, buffers.counter, torch.arange(2), buffers.values[:, :2])
        buffers.note_run()
        table = blocks + [0] * (4 - len(blocks))
        assert buffers.block_tables[:3].tolist() == [table, table, [0] * 4]
        assert buffers.kv_indices[:6].tolist() == [4 * blocks[0] + position for position in range(4)] + [0, 0]
        assert slots.block_tables[1].tolist() == table


def test_another_runs_results_are_never_taken_for_ours() -> None:
    """A run whose place was written over is an error, not somebody else's tokens."""
    buffers, _ = make(num_stages=2)
    numbers = []
    for run in range(3):
        ids = torch.tensor([run, 10 + run])
        write_ring(buffers.ring_ids, buffers.ring_values, buffers.counter, ids, buffers.values[:, :2])
        numbers.append(buffers.note_run())
    assert numbers == [0, 1, 2]
    assert buffers.results(1, 2).token_ids == [1, 11]
    assert buffers.results(2, 2).token_ids == [2, 12]
    with pytest.raises(RunLostError, match="run 2, not of run 0"):
        buffers.results(0, 2)
