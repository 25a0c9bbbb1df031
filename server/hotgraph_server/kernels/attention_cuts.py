"""How the Triton kernels of attention are cut up: splits of rows, tiles, warps. It knows sizes, no tensor and no length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hotgraph_server.kernels.jit import next_power_of_two

MULTIPROCESSORS = 132
"""Of an H100 or H200, where the choices below were measured."""
MAX_SPLITS = 32
"""Shares of a row at most: programs that may meet for a row and KV head."""
FULL_GRID = 256
"""Decode programs of one head each from which a step is one of many rows: about two for each multiprocessor without splits."""
FEW_GROUPS = 16
"""Decode programs of grouped heads, without splits, up to which they load ahead: more keep the memory busy without that."""
LONG_SHARE = 1024
"""Keys of a share at most: one that long costs nothing over a longer one, and a long row keeps no program busy for longer."""
NO_WINDOW = 1 << 30
"""Keys that a layer without a window sees: more than there are."""
_FEW_INVARIANT = 64  # decode programs of `attention_invariant.py`, without parts, up to which large tiles are as fast
_MAX_PARTS = 1024  # shares that the scratch of a step has room for, if all rows have as many: 17 MB for 32 heads of 128
_MAX_INVARIANT_BYTES = 64 << 20  # of scratch of a step; rows that would need more are not shared among programs


@dataclass(frozen=True, slots=True)
class Splits:
    """How decode rows are split: each by its own length, which the device knows, whatever the others' are.

    A row that sees n keys has shares of n / num_even of them, but of `least_share` at least and `most_share` at most, unless it
    had more than max_splits then; of a multiple of 16. num_even and max_splits are powers of two. Of each row the first
    num_even shares have a program of their own; what is left has, whatever row it is of, one of the num_extra programs that
    there are for each row of the step. Only in a step of so many long rows that these do not suffice `most_share` is more.
    """

    num_even: int
    max_splits: int
    num_extra: int
    least_share: int
    most_share: int

    @property
    def num_layers(self) -> int:
        """Programs of each row and head."""
        return self.num_even + self.num_extra


@dataclass(frozen=True, slots=True)
class Cut:
    """How a decode program works. num_together: those that a multiprocessor has registers and shared memory for,
    which may have to be told to the compiler: max_registers, of a thread.

    num_rounds: loads of 16 bytes of a thread that a lane's key takes; is_ahead: see `attention_decode.py`.
    """

    tile_keys: int
    num_warps: int
    num_rounds: int
    is_ahead: bool
    num_together: int
    least_share: int
    max_registers: int | None = None


def split_rows(num_rows: int, num_programs: int, cut: Cut, *, max_context: int) -> Splits:
    """How a step's rows are split so that as many programs run as can at a time, if it has so many rows of one length.

    num_programs: of a row, without splits; max_context: what a row can have at most, not what the rows at hand have.
    """
    room = MULTIPROCESSORS * cut.num_together
    useful = min(MAX_SPLITS, -(-max_context // cut.least_share))
    num_even = 1
    while 2 * num_even <= MAX_SPLITS and num_even < useful and 2 * num_even * num_rows * num_programs <= room:
        num_even *= 2
    max_splits = max(num_even, 2)  # so that there is scratch always, and no kernel for steps without
    # A lone row has no others to keep waiting.
    while num_rows > 1 and max_splits < MAX_SPLITS and max_splits * LONG_SHARE < max_context:
        if max_splits >= 4 and 2 * max_splits * num_rows > _MAX_PARTS:
            break
        max_splits *= 2
    num_extra = 0
    if num_rows > 1 and num_even * LONG_SHARE < max_context:
        # As many as can run at a time, or else one for each share that there can be.
        num_extra = min(max_splits - num_even, max(1, -(-room // (num_programs * num_rows))))
    most_share = max(LONG_SHARE, cut.least_share) if num_extra > 0 else NO_WINDOW
    return Splits(num_even, max_splits, num_extra, cut.least_share, most_share)


@dataclass(frozen=True, slots=True)
class InvariantTile:
    """How a program of `attention_invariant.py` works. Its keys are in `tile_options`, as its sums depend on them.

    num_together: programs of rows of one token that a multiprocessor works through best.
    """

    tile_rows: int
    num_warps: int
    num_together: int


def invariant_tiles(
    large: InvariantTile, num_rows: int, num_tokens: int, num_programs: int, heads: int
) -> tuple[InvariantTile, InvariantTile]:
    """For rows of one token, and for all others, which take the large tile. num_programs: of a row; heads: of a program.

    Measured on an H200 for 128 elements of 16 bits: one warp a tile moves the keys of 64 rows at 82 to 86 % of what memory can,
    four warps with tiles of 64 rows at 48 to 60 %; these are as fast or faster for few programs.
    """
    # Only where four warps have tiles of 64 rows do they have the numbers in the same places as one has.
    if (large.tile_rows, large.num_warps) != (64, 4) or heads > 16:
        return large, large
    if num_rows == 1 < num_tokens or num_rows * num_programs < _FEW_INVARIANT:
        return large, large
    return InvariantTile(16, 1, num_together=4), large


def invariant_parts(
    num_rows: int, num_tokens: int, num_programs: int, max_shares: int, *, num_together: int, share_bytes: int
) -> int:
    """Programs that may share a row of one token, a power of two: as many as run at a time if all rows have as many.

    num_programs: of a row that is not shared; share_bytes: of scratch, for each row and share.
    """
    if num_rows == 1 < num_tokens or num_rows * max_shares * share_bytes > _MAX_INVARIANT_BYTES:
        return 1
    num_parts = 1
    while num_parts < max_shares and 2 * num_parts * num_rows * num_programs <= num_together * MULTIPROCESSORS:
        num_parts *= 2
    return num_parts


def decode_cut(heads: int, row_bytes: int, dtype: torch.dtype, num_programs: int) -> Cut:
    """num_programs: of the step, without splits. Few choices, as each is a kernel of its own.

    Measured on an H200 for 128 elements of 16 bits; wider rows take fewer keys. A program of `_attend_ahead` has two tiles on
    their way in its registers. One head: large tiles where programs are so many that no more fit anyway, or so few that all of
    a short row should be on its way at once; in between twice as many small ones are faster. Grouped heads: tiles of few rows
    are loaded ahead, those of more rows go through shared memory.
    """
    if heads == 1:
        room = 4 * MULTIPROCESSORS
        if num_programs >= FULL_GRID:
            return Cut(32 if row_bytes <= 256 else 16, 2, 2, True, 4, 128)
        if num_programs * MAX_SPLITS // 2 <= room:
            return Cut(32 if row_bytes <= 256 else 16, 2, 2, True, 4, 32)
        return Cut(16, 2, 2, True, 8, 32, max_registers=128 if row_bytes <= 256 else None)
    is_ahead = num_programs <= FEW_GROUPS
    if dtype == torch.float32:  # multiplied outside the tensor cores, and out of registers
        return Cut(16, 8, 1, is_ahead, 2, 64)
    tile_keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if is_ahead:
        return Cut(max(16, tile_keys // 2), 4, 1, True, 3, 64)
    return Cut(tile_keys, 4, 1, False, 4, 64)


def decode_options(cut: Cut, heads: int, row_bytes: int, padded_value_dim: int) -> dict[str, int | None]:
    num_threads, splits_at_once = 32 * cut.num_warps, 16
    return {
        "IS_AHEAD": cut.is_ahead,
        "padded_heads": 1 if heads == 1 else max(16, next_power_of_two(heads)),  # tl.dot takes 16 rows at least
        "tile_keys": cut.tile_keys,
        # As many keys as the threads can load in a round, or two, with 16 bytes each: a lane's keys are all its own threads'.
        "lanes": max(1, min(cut.tile_keys, cut.num_rounds * num_threads * 16 // row_bytes)),
        "splits_at_once": splits_at_once,
        # Of the sums of so many splits, what fits 64 registers of each thread.
        "heads_at_once": max(1, min(next_power_of_two(heads), num_threads * 64 // (splits_at_once * padded_value_dim))),
        "num_warps": cut.num_warps,
        "num_stages": 2,
        "maxnreg": cut.max_registers,
    }


def tile_options(heads: int, row_bytes: int, dtype: torch.dtype) -> dict[str, int]:
    """64 x 64 was best or near it on an H200 for 128 elements of 16 bits; wider rows take fewer keys or more warps."""
    tile_rows, tile_keys, num_warps = 64, 64, 4
    if dtype == torch.float32:  # as above
        tile_rows, tile_keys, num_warps = 32, 32 if row_bytes <= 256 else 16, 8
    elif row_bytes > 512:
        tile_rows, tile_keys, num_warps = 32, 16, 8
    elif row_bytes > 256:
        tile_keys, num_warps = 32, 8
    return {
        "tile_rows": tile_rows,
        "tile_tokens": tile_rows // heads,
        "tile_keys": tile_keys,
        "num_warps": num_warps,
        "num_stages": 2,
    }
