"""Step buffers: what is uploaded, and whose results are read."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.batch import Batch, Row
from hotgraph_server.engine.buffers import RunLostError, StepBuffers
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.kernels.prepare import FROM_SLOT, LAST_TOKEN
from hotgraph_server.kernels.ring import write_ring

CPU = torch.device("cpu")


def make(num_stages: int = 2) -> tuple[StepBuffers, SlotTables]:
    """Eight tokens of four rows."""
    slots = SlotTables(num_slots=4, max_blocks=4, vocabulary_size=20, device=CPU)
    return StepBuffers(slots, max_tokens=8, max_rows=4, max_blocks=4, device=CPU, num_stages=num_stages), slots


def test_decode_rows_are_the_same_at_every_step() -> None:
    """What the host says of a decode row does not change as the row grows, so nothing has to be uploaded."""
    buffers, slots = make()
    seen = []
    for start in (5, 6, 7):
        rows = [Row(2, start, 1, None, True), Row(0, start + 3, 1, None, True)]
        step = buffers.fill(Batch(step=start, rows=rows), 3, 3)
        assert step.context_lens == [start + 1, start + 4]
        seen.append((buffers.row_slots.tolist(), buffers.row_starts.tolist(), buffers.given_ids.tolist()))
    assert seen[0] == seen[1] == seen[2]
    assert buffers.row_slots[:3].tolist() == [2, 0, slots.scratch_slot]
    assert buffers.row_starts[:3].tolist() == [FROM_SLOT, FROM_SLOT, 0]
    assert buffers.given_ids[:3].tolist() == [LAST_TOKEN, LAST_TOKEN, 0]


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
