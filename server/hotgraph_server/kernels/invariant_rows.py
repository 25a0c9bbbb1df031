"""Matrix products for any number of rows whose sums have one order for each weight. It knows one product, no model.

`few_rows.py`, `tile_rows.py` and cuBLAS are each fastest for some numbers of rows, and add up in orders of their own, so that a
row's last bits depend on how many stand beside it. Here all numbers of rows go through the kernel of `tile_rows.py`, and what
its order depends on, how many programs share a sum and how many columns each has of it, follows from the weight's sizes alone:
`sum_order`. Only what does not touch the order is chosen by the number of rows: room for tokens, tiles, and the ring.

So a row has the same bits alone, beside any others, at any place, and with any padding. On the CPU what runs is the definition,
which promises nothing of this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows_cuts import COLUMNS, MAX_ROWS, SHARED_BYTES, SplitRoom, TileTuning
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton, tile_rows_qkv_triton

ROOMS = (8, 16, 32, 64, 128, 256)
"""Tokens that a program may have room for; of more than the last, blocks have programs of their own."""

MAX_SPLITS = 2

_MIN_SPLIT_INPUTS = 2048  # below, the stretches of a split sum are too short to fill a ring
_MIN_SPLIT_ROWS = (
    2880  # of a weight, from which on two programs for each 64 of them are nearly one for each multiprocessor
)
_MULTIPROCESSORS = 132  # of an H100 or H200
_FEW_PROGRAMS = 90  # from which on most of these have one
_MAX_STAGES = 8


@dataclass(frozen=True, slots=True)
class SumOrder:
    """All that the bits of a product depend on beside its numbers: how many share a sum, and columns that each has of it."""

    splits: int
    stretch: int


def sum_order(num_weight_rows: int, num_inputs: int, *, is_normed: bool) -> SumOrder:
    """Of a weight [num_weight_rows, num_inputs]; is_normed: what it multiplies is normed first, as all but O and down are.

    What is normed has so many outputs that there are programs enough. A sum that is not split has one stretch, whose length in
    tiles is left open, as columns beyond the weight are zeros.
    """
    if is_normed or num_inputs < _MIN_SPLIT_INPUTS or num_weight_rows < _MIN_SPLIT_ROWS:
        return SumOrder(1, num_inputs)
    unit = 2 * COLUMNS
    return SumOrder(MAX_SPLITS, -(-num_inputs // (MAX_SPLITS * unit)) * unit)


def room_for(num_rows: int, *, is_normed: bool, head_dim: int = 0) -> int:
    """Tokens that the kernel for so many has room for: one of ROOMS. What is known of the product: as in `tuned`."""
    if num_rows <= MAX_ROWS:
        return max(next_power_of_two(num_rows), ROOMS[0])
    # Blocks of 256 where they are padded by no more than those of 128. With a residual, or what turns heads, they do not fit
    # the registers.
    return 256 if is_normed and head_dim == 0 and -(-num_rows // 128) % 2 == 0 else 128


def padded_rows(max_rows: int) -> int:
    """Rows with their padding, at most, of any number up to max_rows: what a `SplitRoom` has to have room for."""
    return MAX_ROWS if max_rows <= MAX_ROWS else -(-max_rows // 256) * 256


def order_of(tuning: TileTuning, num_inputs: int) -> SumOrder:
    """The order in which a product that is cut up so is summed."""
    return SumOrder(tuning.splits, num_inputs if tuning.splits == 1 else tuning.stretch(num_inputs))


# With room for 8 and 16 tokens, for 32 and for 64: as in `tile_rows.py`, but that O is split with 64, too.
_FEW: dict[str, tuple[TileTuning, TileTuning, TileTuning]] = {
    "qkv": (
        TileTuning(64, parts=2, num_stages=4),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
    "gate_up": (
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=1, num_stages=4),
    ),
    "head": (
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
    "added": (TileTuning(64, parts=2, num_stages=6),) * 3,
}


def tuned(
    num_rows: int, num_weight_rows: int, num_inputs: int, *, is_gated: bool, is_normed: bool, head_dim: int = 0
) -> TileTuning:
    """What a product is cut into. There is one kernel for each weight and room, and one more for several blocks of 128 rows.

    is_normed: as in `sum_order`; what is not has a residual. head_dim: of heads to be turned.
    """
    room = room_for(num_rows, is_normed=is_normed, head_dim=head_dim)
    return _tuned(room, num_rows > room == 128, num_weight_rows, num_inputs, is_gated, is_normed, head_dim)


@cache  # of as many as a model has products, and asked for each of them in each step
def _tuned(
    room: int, has_blocks: bool, num_weight_rows: int, num_inputs: int, is_gated: bool, is_normed: bool, head_dim: int
) -> TileTuning:
    order = sum_order(num_weight_rows, num_inputs, is_normed=is_normed)
    if is_gated:
        name = "gate_up"
    elif is_normed:
        name = "qkv" if head_dim > 0 or num_weight_rows < 24_000 else "head"
    else:
        name = "added"
    if room <= MAX_ROWS:
        tuning = _FEW[name][max(ROOMS.index(room) - 1, 0)]
    else:
        tuning = TileTuning(128, parts=1, num_stages=_MAX_STAGES, num_warps=8)
    tuning = replace(tuning, splits=order.splits)
    # Heads whose halves no box divides; and small weights, whose programs take fewer rows each. What is split has 64 at least.
    while (head_dim > 0 and (head_dim // 2) % (tuning.block_rows // 2) != 0) or (
        tuning.block_rows > (64 if order.splits > 1 else 32)
        and num_weight_rows * tuning.splits * (2 if has_blocks else 1) < tuning.block_rows * _FEW_PROGRAMS
    ):
        tuning = replace(tuning, block_rows=tuning.block_rows // 2, num_warps=4, triggers_late=True)
    stage_bytes = replace(tuning, num_stages=1).shared_bytes(room)
    num_stages = min(tuning.num_stages, _num_steps(tuning, num_inputs), (SHARED_BYTES - 1024) // stage_bytes)
    num_programs = -(-num_weight_rows // tuning.block_rows) * tuning.splits * (2 if has_blocks else 1)
    num_for_two = (SHARED_BYTES // 2 - 1024) // stage_bytes
    if num_programs > _MULTIPROCESSORS and num_for_two >= 3 and not (is_normed and room <= MAX_ROWS):
        # A ring that fills a multiprocessor is best where each has one program. Of more than that, two have to fit.
        num_stages = min(num_stages, num_for_two)
    tuning = replace(tuning, num_stages=num_stages)
    assert order_of(tuning, num_inputs) == order, "one order for all numbers of rows"
    return tuning


def _num_steps(tuning: TileTuning, num_inputs: int) -> int:
    return -(-tuning.stretch(num_inputs) // (COLUMNS * tuning.parts))


def invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    normed: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    split_room: SplitRoom | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`tile_rows.tile_rows_linear` for any number of rows, each of which has the same bits whatever the others are.

    split_room: for `padded_rows` of x; without one a product that needs it makes one.
    """
    if not x.is_cuda:
        result = few_rows_reference(
            x, weight, bias=bias, norm=norm, epsilon=epsilon, activation=activation, residual=residual
        )
        return result if out is None else out.copy_(result)
    tuning = tuned(len(x), *weight.shape, is_gated=activation is not None, is_normed=norm is not None)
    return tile_rows_linear_triton(
        x,
        weight,
        out,
        bias=bias,
        norm=norm,
        epsilon=epsilon,
        normed=normed,
        activation=activation,
        residual=residual,
        split_room=_room(split_room, tuning, x, weight),
        pdl=pdl,
        tuning=tuning,
        room=room_for(len(x), is_normed=norm is not None),
    )


def invariant_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    rope: RopePlan,
    kv_indices: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    normed: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`tile_rows.tile_rows_qkv` alike."""
    if not x.is_cuda:
        query = few_rows_qkv_reference(x, weight, rope, kv_indices, keys, values, bias=bias, norm=norm, epsilon=epsilon)
        return query if out is None else out.copy_(query)
    tuning = tuned(len(x), *weight.shape, is_gated=False, is_normed=True, head_dim=keys.shape[3])
    return tile_rows_qkv_triton(
        x,
        weight,
        rope,
        kv_indices,
        keys,
        values,
        out,
        bias=bias,
        norm=norm,
        epsilon=epsilon,
        normed=normed,
        pdl=pdl,
        tuning=tuning,
        room=room_for(len(x), is_normed=True, head_dim=keys.shape[3]),
    )


def _room(split_room: SplitRoom | None, tuning: TileTuning, x: torch.Tensor, weight: torch.Tensor) -> SplitRoom | None:
    if tuning.splits == 1 or split_room is not None:
        return split_room
    return SplitRoom.for_outputs(len(weight), x.device, splits=tuning.splits, num_rows=padded_rows(len(x)))
