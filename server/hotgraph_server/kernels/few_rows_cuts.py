"""How products for 1 to 16 rows are cut up: the tunings that their kernels take, and the rule that chooses one.

It knows a product's sizes. What was measured for a GPU goes before the rule: see `tuning.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from hotgraph_server.kernels.jit import next_power_of_two

MAX_ROWS = 16
MAX_SUM_ROWS = 2
"""Rows up to which ordinary multiplications keep up with the memory; above, tensor cores take eight rows or 16 at a time."""


@dataclass(frozen=True, slots=True)
class SumTuning:
    """How a product of one or two rows is cut up.

    block_rows: of the weight, a program; tile: columns loaded at once, 8 at least; both are powers of two. ahead: tiles that
    are requested before the wait and kept in flight.
    """

    block_rows: int
    tile: int
    num_warps: int
    ahead: int = 1
    triggers_late: bool = False


@dataclass(frozen=True, slots=True)
class DotTuning:
    """How a product of 3 to 16 rows is cut up.

    block_rows of the weight a program, 16 or a larger power of two; parts: stretches of 32 columns that a warp loads at once, a
    power of two; ahead, tokens_ahead: tiles of the weight and of x in flight, a tile being 32 * parts * num_warps columns.
    """

    block_rows: int
    parts: int
    num_warps: int
    ahead: int
    tokens_ahead: int
    triggers_late: bool = False


Tuning: TypeAlias = SumTuning | DotTuning
ROW_CLASSES = (1, 2, 8, 16)
"""There is a kernel for one row, one for two, one for up to 8 and one for up to 16, and a tuning for each."""

# For one row, for two, for up to 8, for up to 16. What follows the QKV product is let start only after that one's own wait:
# attention then knows that older keys are complete, and reads them before its own.
_BEST: dict[str, tuple[SumTuning, SumTuning, DotTuning, DotTuning]] = {
    "qkv": (
        SumTuning(4, 4096, num_warps=4, ahead=1, triggers_late=True),
        SumTuning(4, 2048, num_warps=4, ahead=1, triggers_late=True),
        DotTuning(16, parts=2, num_warps=2, ahead=6, tokens_ahead=2, triggers_late=True),
        DotTuning(32, parts=2, num_warps=2, ahead=3, tokens_ahead=2, triggers_late=True),
    ),
    "o": (
        SumTuning(8, 2048, num_warps=4, ahead=1),
        SumTuning(4, 2048, num_warps=4, ahead=2),
        DotTuning(32, parts=1, num_warps=8, ahead=6, tokens_ahead=2),
        DotTuning(16, parts=4, num_warps=4, ahead=2, tokens_ahead=2),
    ),
    "gate_up": (
        SumTuning(4, 4096, num_warps=4, ahead=1),
        SumTuning(4, 2048, num_warps=4, ahead=2),
        DotTuning(16, parts=2, num_warps=4, ahead=6, tokens_ahead=2),
        DotTuning(16, parts=4, num_warps=2, ahead=2, tokens_ahead=2),
    ),
    "down": (
        SumTuning(4, 2048, num_warps=8, ahead=3),
        SumTuning(8, 2048, num_warps=4, ahead=2),
        DotTuning(16, parts=4, num_warps=8, ahead=2, tokens_ahead=2),
        DotTuning(16, parts=4, num_warps=4, ahead=2, tokens_ahead=2),
    ),
}

# Programs from which on there is one for each of the 132 multiprocessors of an H200, or nearly.
_FEW_PROGRAMS = 128


def row_class(num_rows: int) -> int:
    """The one of ROW_CLASSES whose kernel serves so many rows."""
    assert 1 <= num_rows <= MAX_ROWS, "few rows"
    return next(largest for largest in ROW_CLASSES if num_rows <= largest)


def tuned(num_rows: int, num_weight_rows: int, num_inputs: int, *, is_gated: bool, is_normed: bool) -> Tuning:
    """What a product is cut into: the best found on an H200 for the product of a 7B Llama that it is most like.

    There are four kernels for each weight: for one row, for two, up to 8 and up to 16. A head is taken for queries, keys and
    values: it triggers late, which nobody behind it minds. This is the rule for shapes that nobody has measured; for those that
    somebody has see `tuning.py`.
    """
    name = "gate_up" if is_gated else "qkv" if is_normed else "down" if num_inputs > 8192 else "o"
    tuning = _BEST[name][ROW_CLASSES.index(row_class(num_rows))]
    if isinstance(tuning, SumTuning):
        # Small models: a thread takes eight neighbours, and more threads than that have nothing to do.
        tile = min(tuning.tile, max(next_power_of_two(num_inputs), 256))
        return replace(tuning, tile=tile, num_warps=min(tuning.num_warps, tile // 256))
    # Small models: few programs take fewer rows each, and no tile is requested that lies beyond the weight.
    block_rows = 16 if num_weight_rows < tuning.block_rows * _FEW_PROGRAMS else tuning.block_rows
    ahead = min(tuning.ahead, -(-num_inputs // (32 * tuning.parts * tuning.num_warps)))
    return replace(tuning, block_rows=block_rows, ahead=ahead, tokens_ahead=min(tuning.tokens_ahead, ahead))
