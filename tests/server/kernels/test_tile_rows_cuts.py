"""Tests of tile_rows_cuts.py: the rule gives what the kernel takes."""

from __future__ import annotations

import pytest

from hotgraph_server.kernels.tile_rows_cuts import ROOMS, room_for, tuned

SHARED_BYTES_OF_A_MULTIPROCESSOR = 233_472
ROW_COUNTS = (*range(1, 66), 100, 127, 128, 129, 200, 256, 257, 300, 384, 385, 512, 513, 1000, 1024)


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("num_inputs", [16, 576, 1536, 2048, 4096, 8192, 11008, 14336, 28672])
@pytest.mark.parametrize("num_outputs", [16, 576, 960, 2048, 2880, 3072, 4096, 5120, 8192, 12288, 128256])
def test_tunings_fit_every_size(num_outputs: int, num_inputs: int, is_normed: bool) -> None:
    """For all numbers of rows, and whatever stands behind: the ring fits, no stage is in vain, boxes divide heads."""
    kinds = [(False, 0), (True, 0), (False, 32), (False, 64), (False, 96), (False, 128)] if is_normed else [(False, 0)]
    for is_gated, head_dim in kinds:
        for num_rows in ROW_COUNTS:
            tuning = tuned(num_rows, num_outputs, num_inputs, is_gated=is_gated, is_normed=is_normed, head_dim=head_dim)
            room = room_for(num_rows, is_normed=is_normed, head_dim=head_dim)
            assert tuning.shared_bytes(room) <= SHARED_BYTES_OF_A_MULTIPROCESSOR - 1024
            assert 1 <= tuning.num_stages <= tuning.num_steps(num_inputs) == -(-num_inputs // (64 * tuning.parts))
            assert tuning.block_rows >= 32
            assert tuning.num_warps == (8 if tuning.block_rows == 128 else 4)
            if head_dim > 0:
                assert head_dim % tuning.block_rows == 0
            if tuning.block_rows > 32:
                has_blocks = num_rows > room == 128
                least_programs = 90 if is_normed or has_blocks else 60
                assert num_outputs * (2 if has_blocks else 1) >= least_programs * tuning.block_rows


def test_rooms_hold_all_rows() -> None:
    """Up to 64 rows in one program, beyond in blocks; padding is less than a block."""
    for is_normed, head_dim in ((False, 0), (True, 0), (True, 64)):
        for num_rows in range(1, 1100):
            room = room_for(num_rows, is_normed=is_normed, head_dim=head_dim)
            assert room in ROOMS
            num_blocks = -(-num_rows // room)
            assert num_blocks == 1 or room > 64
            assert num_blocks * room <= max(2 * num_rows, 8)
            assert room <= (256 if is_normed and head_dim == 0 else 128)
