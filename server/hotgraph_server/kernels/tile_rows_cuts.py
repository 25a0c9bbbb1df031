"""How products in one order are cut up: the tunings that their kernel takes, and the rule that chooses one. It knows sizes.

No sum is split among programs: see `tile_rows.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from hotgraph_server.kernels.jit import next_power_of_two

ROOMS = (8, 16, 32, 64, 128, 256)
"""Tokens that a program may have room for; of more than the last, blocks have programs of their own."""
MAX_ROWS = 64
"""Tokens that one program takes; of more, blocks do."""
COLUMNS = 64
"""Of a tile; the kernel has the same number."""
SHARED_BYTES = 232_448
"""Of a multiprocessor's shared memory, what one program can have."""
_BARRIER_BYTES = 8
_MULTIPROCESSORS = 132  # of an H100 or H200
# Programs from which on most of these have one, and, for what is not normed, from which on as many bytes are on their way.
_FEW_PROGRAMS = 90
_FEW_ADDED_PROGRAMS = 60
_MAX_STAGES = 8


@dataclass(frozen=True, slots=True)
class TileTuning:
    """How a product is cut up.

    block_rows: of the weight, a program: 16, 32, 64 or 128, in pairs 32, 64 or 128; parts: tiles of 64 columns that are waited
    for at once; num_stages: as many of these in flight, 2 at least; num_warps: 4, or 8 for 128 rows; triggers_late: the next
    kernel starts at the end of the products, not after the wait.
    """

    block_rows: int
    parts: int
    num_stages: int
    num_warps: int = 4
    triggers_late: bool = True

    @property
    def tile_rows(self) -> int:
        """Of a tile as the tensor cores take it."""
        return max(self.block_rows, 64)

    def num_steps(self, num_inputs: int) -> int:
        """Of a program's loop, for a weight of so many columns."""
        return -(-num_inputs // (COLUMNS * self.parts))

    def shared_bytes(self, room: int) -> int:
        """Of shared memory, with room for so many tokens."""
        tiles_bytes = self.parts * (self.tile_rows + room) * COLUMNS * 2
        return self.num_stages * (tiles_bytes + _BARRIER_BYTES)


def room_for(num_rows: int, *, is_normed: bool, head_dim: int = 0) -> int:
    """Tokens that the kernel for so many has room for: one of ROOMS. What is known of the product: as in `tuned`."""
    if num_rows <= MAX_ROWS:
        return max(next_power_of_two(num_rows), ROOMS[0])
    # Blocks of 256 where they are padded by no more than those of 128. With a residual, or what turns heads, they do not fit
    # the registers.
    return 256 if is_normed and head_dim == 0 and -(-num_rows // 128) % 2 == 0 else 128


# With room for 8 tokens, 16, 32 and 64: what was fastest, or within 1 % of it, on an H200 for a 7B Llama.
_FEW: dict[str, tuple[TileTuning, TileTuning, TileTuning, TileTuning]] = {
    "qkv": (
        TileTuning(64, parts=2, num_stages=4),
        TileTuning(64, parts=2, num_stages=4),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
    "gate_up": (
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=1, num_stages=4),
    ),
    "head": (
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
    # O and down, of few outputs: half of the multiprocessors with twice the ring are as fast as all of them.
    "o": (
        TileTuning(64, parts=4, num_stages=4),
        TileTuning(64, parts=2, num_stages=8),
        TileTuning(32, parts=2, num_stages=8),
        TileTuning(32, parts=2, num_stages=6, triggers_late=False),
    ),
    "down": (
        TileTuning(64, parts=4, num_stages=6),
        TileTuning(32, parts=2, num_stages=10, triggers_late=False),
        TileTuning(64, parts=2, num_stages=8),
        TileTuning(32, parts=2, num_stages=6, triggers_late=False),
    ),
}


def tuned(
    num_rows: int, num_weight_rows: int, num_inputs: int, *, is_gated: bool, is_normed: bool, head_dim: int = 0
) -> TileTuning:
    """What a product is cut into. There is one kernel for each weight and room, and one more for several blocks of 128 rows.

    is_normed: what it multiplies is normed first, as of all but O and down, which have a residual. head_dim: of heads to be
    turned.
    """
    room = room_for(num_rows, is_normed=is_normed, head_dim=head_dim)
    return _tuned(room, num_rows > room == 128, num_weight_rows, num_inputs, is_gated, is_normed, head_dim)


@cache  # of as many as a model has products, and asked for each of them in each step
def _tuned(
    room: int, has_blocks: bool, num_weight_rows: int, num_inputs: int, is_gated: bool, is_normed: bool, head_dim: int
) -> TileTuning:
    if is_gated:
        name = "gate_up"
    elif is_normed:
        name = "qkv" if head_dim > 0 or num_weight_rows < 24_000 else "head"
    else:
        name = "down" if num_inputs > 8192 else "o"
    if room <= MAX_ROWS:
        tuning = _FEW[name][ROOMS.index(room)]
    else:
        tuning = TileTuning(128, parts=1, num_stages=_MAX_STAGES, num_warps=8)
    num_blocks = 2 if has_blocks else 1
    least_programs = _FEW_PROGRAMS if is_normed or has_blocks else _FEW_ADDED_PROGRAMS
    # Heads whose halves no box divides; and small weights, whose programs take fewer rows each.
    while (head_dim > 0 and (head_dim // 2) % (tuning.block_rows // 2) != 0) or (
        tuning.block_rows > 32 and num_weight_rows * num_blocks < tuning.block_rows * least_programs
    ):
        tuning = replace(tuning, block_rows=tuning.block_rows // 2, num_warps=4, triggers_late=True)
    stage_bytes = replace(tuning, num_stages=1).shared_bytes(room)
    num_stages = min(tuning.num_stages, tuning.num_steps(num_inputs), (SHARED_BYTES - 1024) // stage_bytes)
    num_programs = -(-num_weight_rows // tuning.block_rows) * num_blocks
    num_for_two = (SHARED_BYTES // 2 - 1024) // stage_bytes
    if num_programs > _MULTIPROCESSORS and num_for_two >= 3 and not (is_normed and room <= MAX_ROWS):
        # A ring that fills a multiprocessor is best where each has one program. Of more than that, two have to fit.
        num_stages = min(num_stages, num_for_two)
    return replace(tuning, num_stages=num_stages)
