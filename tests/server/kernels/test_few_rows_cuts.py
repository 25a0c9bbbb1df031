"""Tests of few_rows_cuts.py: the rule gives what the kernels take."""

from __future__ import annotations

from hotgraph_server.kernels.few_rows_cuts import MAX_ROWS, DotTuning, tuned


def test_tunings_fit_every_size() -> None:
    """Whatever the sizes: blocks are powers of two, no tile is requested in vain, a thread has eight numbers of a row."""
    for num_rows in range(1, MAX_ROWS + 1):
        for num_inputs in (16, 576, 1536, 2048, 4096, 8192, 11008, 28672):
            for num_outputs in (16, 960, 4096, 12288, 128256):
                for is_gated in (False, True):
                    tuning = tuned(num_rows, num_outputs, num_inputs, is_gated=is_gated, is_normed=is_gated)
                    assert tuning.block_rows & (tuning.block_rows - 1) == 0
                    if isinstance(tuning, DotTuning):
                        assert num_rows > 2
                        assert 1 <= tuning.tokens_ahead <= tuning.ahead
                        assert (tuning.ahead - 1) * 32 * tuning.parts * tuning.num_warps < num_inputs
                        assert tuning.block_rows == 16 or num_outputs >= 128 * tuning.block_rows
                        continue
                    assert num_rows <= 2
                    assert tuning.tile & (tuning.tile - 1) == 0
                    assert tuning.tile >= 256 * tuning.num_warps
                    assert tuning.tile < 2 * max(num_inputs, 129)
