"""Tests of attention_cuts.py: splits fill the GPU and no more, whatever a step's rows and their lengths."""

from __future__ import annotations

import pytest

from hotgraph_server.kernels.attention_cuts import (
    LONG_SHARE,
    MAX_SPLITS,
    MULTIPROCESSORS,
    Cut,
    InvariantTile,
    invariant_parts,
    invariant_tiles,
    split_rows,
)

CUTS = (Cut(32, 2, 2, True, 4, 128), Cut(16, 2, 2, True, 8, 32), Cut(64, 4, 1, False, 4, 64))


@pytest.mark.parametrize("num_programs", [1, 3, 8, 32, 40, 71, 300])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_splits_fill_the_grid(cut: Cut, num_programs: int) -> None:
    """Rows of one length get as many programs as run at a time, or nearly; no more, and none that no row could need."""
    for num_rows in range(1, 65):
        room = MULTIPROCESSORS * cut.num_together
        for max_context in (16, 4096, 1 << 20):
            splits = split_rows(num_rows, num_programs, cut, max_context=max_context)
            num_used = num_rows * num_programs * splits.num_even
            useful = min(-(-max_context // cut.least_share), MAX_SPLITS)
            assert splits.num_even == 1 or num_used <= room
            assert splits.num_even >= useful or 2 * num_used > room
            assert splits.num_even == 1 or splits.num_even < 2 * useful
            assert splits.num_even <= splits.max_splits <= MAX_SPLITS
            assert all(number.bit_count() == 1 for number in (splits.num_even, splits.max_splits))


@pytest.mark.parametrize(("num_rows", "num_programs"), [(8, 32), (64, 32), (32, 8), (200, 32)])
def test_long_rows_have_more_shares_than_others(num_rows: int, num_programs: int) -> None:
    """So many that none is longer than LONG_SHARE, within the scratch; their programs fill the GPU; a lone row has none."""
    for cut in CUTS:
        most_parts = 0
        for max_context in (16, LONG_SHARE, LONG_SHARE + 1, 16384, 1 << 20):
            splits = split_rows(num_rows, num_programs, cut, max_context=max_context)
            if max_context <= LONG_SHARE * splits.num_even:
                assert splits.num_extra == 0
                assert splits.max_splits == max(splits.num_even, 2)
                continue
            most_parts = max(most_parts, splits.max_splits * num_rows)
            is_bounded = splits.max_splits == MAX_SPLITS or 2 * splits.max_splits * num_rows > 1024
            assert is_bounded or splits.max_splits * LONG_SHARE >= max_context
            num_extra_programs = splits.num_extra * num_rows * num_programs
            assert num_extra_programs >= MULTIPROCESSORS * cut.num_together or splits.num_extra == (
                splits.max_splits - splits.num_even
            )
            lone = split_rows(1, num_programs, cut, max_context=max_context)
            assert lone.num_extra == 0
            assert lone.num_even * lone.most_share >= max_context
        assert most_parts <= max(1024, 4 * num_rows)


def test_parts_of_a_row() -> None:
    """As many programs as run at a time, no more than shares, none that a lone prompt cannot use, and scratch within bounds."""
    options = {"num_together": 2, "share_bytes": 16640}
    for num_rows in range(1, 65):
        for num_programs in (1, 8, 32):
            parts = invariant_parts(num_rows, num_rows, num_programs, 64, **options)
            assert parts == 1 or parts * num_rows * num_programs <= 2 * MULTIPROCESSORS
            assert parts <= 64
            assert parts.bit_count() == 1
    assert invariant_parts(1, 1, 32, 64, **options) == 8
    assert invariant_parts(1, 300, 32, 64, **options) == 1
    assert invariant_parts(1, 1, 32, 2, **options) == 2
    assert invariant_parts(4, 4, 8, 2048, **options) == 1
    assert invariant_parts(4, 4, 32, 64, num_together=4, share_bytes=16640) == 4


@pytest.mark.parametrize("heads", [1, 4, 16, 17])
def test_many_rows_of_one_token_have_small_tiles(heads: int) -> None:
    """Where the large ones are 64 rows of four warps, and only for steps of enough programs; other rows keep the large ones."""
    large = InvariantTile(64, 4, num_together=2)
    for num_rows in (1, 2, 8, 64):
        for num_tokens in (num_rows, 300):
            small, others = invariant_tiles(large, num_rows, num_tokens, 32, heads)
            assert others == large
            is_small = heads <= 16 and num_rows > 1
            assert (small.tile_rows, small.num_warps) == ((16, 1) if is_small else (64, 4))
    for tile in (InvariantTile(64, 8, num_together=2), InvariantTile(32, 8, num_together=2)):
        assert invariant_tiles(tile, 64, 64, 32, heads) == (tile, tile)
