"""How products for up to 64 rows are cut up: the tunings that their kernel takes, and the rule that chooses one.

It knows a product's sizes. One of few outputs leaves multiprocessors idle unless its sums are split among programs, which then
need room to meet: `SplitRoom`. Without one nothing is split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from hotgraph_server.kernels.jit import next_power_of_two

MAX_ROWS = 64
MAX_SPLITS = 4
COLUMNS = 64
"""Of a tile; the kernel has the same number."""
SHARED_BYTES = 232_448
"""Of a multiprocessor's shared memory, what one program can have."""
_MIN_ROOM = 16  # tokens a kernel has room for, at least
_BARRIER_BYTES = 8
_MULTIPROCESSORS = 132  # of an H100 or H200
# Programs from which on most of these have one.
_FEW_PROGRAMS = 90
# Inputs below which the stretches of a split sum are too short to fill a ring.
_FEW_INPUTS = 2048


@dataclass(frozen=True, slots=True)
class TileTuning:
    """How a product is cut up.

    block_rows: of the weight, a program: 16, 32, 64 or 128, in pairs 32, 64 or 128; parts: tiles of 64 columns that are waited
    for at once; num_stages: as many of these in flight, 2 at least; num_warps: 4, or 8 for 128 rows; splits: programs that
    share a sum, 1 unless block_rows is 64 or 128; triggers_late: the next kernel starts at the end of the products, not after
    the wait.
    """

    block_rows: int
    parts: int
    num_stages: int
    num_warps: int = 4
    splits: int = 1
    triggers_late: bool = True

    @property
    def tile_rows(self) -> int:
        """Of a tile as the tensor cores take it."""
        return max(self.block_rows, 64)

    def stretch(self, num_inputs: int) -> int:
        """Columns whose products one program adds up. With `splits` it is all that the order of sums depends on.

        Of sums that are split it is the same for one part and for two.
        """
        unit = COLUMNS * (self.parts if self.splits == 1 else max(self.parts, 2))
        return -(-num_inputs // (unit * self.splits)) * unit

    def shared_bytes(self, room: int) -> int:
        """Of shared memory, with room for so many tokens."""
        tiles_bytes = self.parts * (self.tile_rows + room) * COLUMNS * 2
        return self.num_stages * (tiles_bytes + _BARRIER_BYTES)


# With room for 16 tokens, for 32 and for 64: what was fastest, or within 1 % of it, on an H200 for a 7B Llama.
# At 64 each program reads as many bytes of x as of its weight, from the cache.
_BEST: dict[str, tuple[TileTuning, TileTuning, TileTuning]] = {
    "qkv": (
        TileTuning(64, parts=2, num_stages=4),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
    "o": (
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(32, parts=2, num_stages=6),
    ),
    "gate_up": (
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=1, num_stages=4),
    ),
    "down": (
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(64, parts=2, num_stages=6, splits=2),
    ),
    "head": (
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
}


@dataclass(frozen=True, slots=True)
class SplitRoom:
    """Where programs that share a sum meet. Products that may run at the same time need one each; a chain's share one.

    partials: float32, any contents; arrivals: int32, zeros, and zeros again after each product.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def for_outputs(cls, num_outputs: int, device: torch.device) -> SplitRoom:
        """For weights of up to `num_outputs` rows, and up to MAX_ROWS rows of x."""
        num_padded = -(-num_outputs // 128) * 128
        return cls(
            torch.empty(MAX_SPLITS * MAX_ROWS * num_padded, dtype=torch.float32, device=device),
            torch.zeros(num_padded // 64, dtype=torch.int32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self.partials.nbytes + self.arrivals.nbytes

    def holds(self, tuning: TileTuning, num_weight_rows: int, room: int) -> bool:
        """Whether a product cut up so finds its place here, with room for so many tokens."""
        return _holds(self.sizes, tuning, num_weight_rows, room)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of partials and of arrivals."""
        return self.partials.numel(), self.arrivals.numel()


def _holds(sizes: tuple[int, int], tuning: TileTuning, num_weight_rows: int, room: int) -> bool:
    num_blocks = -(-num_weight_rows // tuning.block_rows)
    num_partials = num_blocks * tuning.tile_rows * room * tuning.splits
    return num_partials <= sizes[0] and num_blocks <= sizes[1]


def tuned(
    num_rows: int,
    num_weight_rows: int,
    num_inputs: int,
    *,
    is_gated: bool,
    is_normed: bool,
    head_dim: int = 0,
    split_room: SplitRoom | None = None,
) -> TileTuning:
    """What a product is cut into, by the product of a 7B Llama that it is most like; head_dim: of heads to be turned.

    There are three kernels for each weight: for up to 16 rows, 32 and 64.
    """
    sizes = None if split_room is None else split_room.sizes
    return _tuned(room_for(num_rows), num_weight_rows, num_inputs, is_gated, is_normed, head_dim, sizes)


@cache  # of as many as a model has products, and asked for each of them in each step
def _tuned(
    room: int,
    num_weight_rows: int,
    num_inputs: int,
    is_gated: bool,
    is_normed: bool,
    head_dim: int,
    split_sizes: tuple[int, int] | None,
) -> TileTuning:
    if is_gated:
        name = "gate_up"
    elif is_normed:
        name = "qkv" if head_dim > 0 or num_weight_rows < 24_000 else "head"
    else:
        name = "down" if num_inputs > 8192 else "o"
    tuning = _BEST[name][(16, 32, 64).index(room)]
    # Heads whose halves no box of 64 or 32 rows divides.
    while head_dim > 0 and (head_dim // 2) % (tuning.block_rows // 2) != 0:
        tuning = _halved(tuning)
    if tuning.splits > 1 and (
        num_inputs < _FEW_INPUTS or split_sizes is None or not _holds(split_sizes, tuning, num_weight_rows, room)
    ):
        tuning = replace(tuning, splits=1)
    # Small models: few programs take fewer rows each, and no stage is requested that lies beyond the weight.
    while tuning.block_rows > 32 and num_weight_rows < tuning.block_rows * _FEW_PROGRAMS // tuning.splits:
        tuning = _halved(tuning)
    num_stages = min(tuning.num_stages, num_steps_of(tuning, num_inputs))
    if not is_normed and -(-num_weight_rows // tuning.block_rows) * tuning.splits > _MULTIPROCESSORS:
        # A ring that fills a multiprocessor is best where each has one program. Of more than that, two have to fit.
        num_stages = min(num_stages, (SHARED_BYTES // 2 - 1024) // replace(tuning, num_stages=1).shared_bytes(room))
    return replace(tuning, num_stages=num_stages)


def room_for(num_rows: int) -> int:
    """Tokens that the kernel for so many has room for: 16, 32 or 64."""
    return max(next_power_of_two(num_rows), _MIN_ROOM)


def _halved(tuning: TileTuning) -> TileTuning:
    return replace(tuning, block_rows=tuning.block_rows // 2, num_warps=4, splits=1, triggers_late=True)


def num_steps_of(tuning: TileTuning, num_inputs: int) -> int:
    """Steps of a program's loop: as many as its stretch has times `parts` tiles."""
    return tuning.stretch(num_inputs) // (COLUMNS * tuning.parts)
