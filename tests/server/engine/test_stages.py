"""Steps written to the ring of stages reach the device whole, however far the host is ahead."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hotgraph_server.engine.slots import HostSlot
from hotgraph_server.engine.stages import Stages
from hotgraph_server.kernels.prepare_stage import IS_NEW, StageLayout
from tests.server.engine.stage_checks import check_steps
from tests.server.kernels.interpreter import run_interpreted

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_every_step_reads_its_own(num_ahead: int) -> None:
    """Slots assigned anew, tables that grow, and steps of all shapes are read as filled in, with no stage to spare."""
    for seed in range(8):
        check_steps(CPU, seed=seed, num_steps=60, num_ahead=num_ahead)


def test_parts_are_written_where_the_device_looks() -> None:
    """Of a stage just the parts change that are written, and of the ring just the stage."""
    rng = random.Random(3)
    layout = StageLayout(max_rows=5, max_tokens=70, max_blocks=9, num_parameters=14)
    stages = Stages(layout, 3, CPU)
    expected = torch.randint(-(2**31), 2**31, stages.tensor.shape, dtype=torch.int32)
    stages.tensor.copy_(expected)
    for number in (7, 0, 2):
        record, ids, blocks, parameters = (
            torch.tensor([rng.randrange(-(2**31), 2**31) for _ in range(count)], dtype=torch.int32)
            for count in (8, 60, 6, 14)
        )
        held = HostSlot(parameters.numpy().tobytes(), blocks.tolist(), is_new=True, num_told=2)
        stages.write_row(number, 2, *record.tolist())
        stages.write_ids(number, ids.tolist())
        assert stages.write_slot(number, 3, held) == (IS_NEW, 3, 2, 6)
        assert not held.is_changed
        stage = expected[number % 3]
        layout.records(stage)[2] = record
        layout.token_ids(stage)[:60] = ids
        layout.tables(stage)[3, 2:6] = blocks[2:]
        layout.parameters(stage)[3] = parameters
        assert torch.equal(stages.tensor, expected)


def test_the_kernel_reads_the_same() -> None:
    """The checks of `interpreted_stages.py` hold."""
    run_interpreted(Path(__file__).with_name("interpreted_stages.py"))
