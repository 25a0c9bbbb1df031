"""Tests of tile_rows_cuts.py: the rule gives what the kernel takes."""

from __future__ import annotations

import torch

from hotgraph_server.kernels.tile_rows_cuts import SplitRoom, room_for, tuned

CPU = torch.device("cpu")
SHARED_BYTES_OF_A_MULTIPROCESSOR = 233_472


def test_tunings_fit_every_size() -> None:
    """Whatever the sizes: the ring fits, no stage is requested in vain, boxes divide heads, and only what has room is split."""
    rooms = (None, SplitRoom.for_outputs(4096, CPU), SplitRoom.for_outputs(16, CPU))
    for num_rows in (1, 9, 16, 17, 32, 33, 64):
        for num_inputs in (16, 576, 1536, 2048, 4096, 8192, 11008, 28672):
            for num_outputs in (16, 960, 4096, 12288, 128256):
                for is_gated, is_normed, head_dim in (
                    (False, False, 0),
                    (False, True, 0),
                    (True, True, 0),
                    (False, True, 32),
                    (False, True, 64),
                    (False, True, 96),
                    (False, True, 128),
                ):
                    for split_room in rooms:
                        tuning = tuned(
                            num_rows,
                            num_outputs,
                            num_inputs,
                            is_gated=is_gated,
                            is_normed=is_normed,
                            head_dim=head_dim,
                            split_room=split_room,
                        )
                        room = room_for(num_rows)
                        assert num_rows <= room <= max(2 * num_rows, 16)
                        assert tuning.block_rows in {32, 64, 128}
                        assert tuning.num_warps == (8 if tuning.block_rows == 128 else 4)
                        assert tuning.num_stages >= 1
                        assert tuning.shared_bytes(room) < SHARED_BYTES_OF_A_MULTIPROCESSOR - 1024
                        assert (tuning.num_stages - 1) * 64 * tuning.parts * tuning.splits < num_inputs
                        if head_dim > 0:
                            assert head_dim % tuning.block_rows == 0
                        if tuning.splits > 1:
                            assert split_room is not None
                            assert split_room.holds(tuning, num_outputs, room)
                            assert num_inputs >= 2048
                        if tuning.block_rows > 32:
                            assert num_outputs * tuning.splits >= 80 * tuning.block_rows
