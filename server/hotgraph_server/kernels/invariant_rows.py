"""Matrix products for any number of rows whose sums have one order. It knows one product, no model.

`few_rows.py`, `tile_rows.py` and cuBLAS are each fastest for some numbers of rows, and add up in orders of their own, so that a
row's last bits depend on how many stand beside it. Here all numbers of rows go through the kernel of `tile_rows.py`, and each
sum is made by one program, over all columns from the first to the last. What the number of rows chooses, room for tokens, tiles
and the ring, does not touch that order.

So a row has the same bits alone, beside any others, at any place, and with any padding. On the CPU what runs is the definition,
which promises nothing of this. `blas_rows.py` finds out for which numbers of rows cuBLAS gives the same bits, faster.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows_cuts import MAX_ROWS, SHARED_BYTES, TileTuning, num_steps_of
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton, tile_rows_qkv_triton

ROOMS = (8, 16, 32, 64, 128, 256)
"""Tokens that a program may have room for; of more than the last, blocks have programs of their own."""

_MULTIPROCESSORS = 132  # of an H100 or H200
# Programs from which on most of these have one; and those from which on larger tiles are worth more, where rows are many.
_FEW_PROGRAMS = 90
_FEW_LARGE_PROGRAMS = 60
_MAX_STAGES = 8


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
    "added": (
        TileTuning(64, parts=4, num_stages=6),
        TileTuning(64, parts=2, num_stages=10),
        TileTuning(64, parts=2, num_stages=8),
        TileTuning(64, parts=2, num_stages=6),
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
        name = "added"
    if room <= MAX_ROWS:
        tuning = _FEW[name][ROOMS.index(room)]
    else:
        tuning = TileTuning(128, parts=1, num_stages=_MAX_STAGES, num_warps=8)
    num_blocks = 2 if has_blocks else 1
    least_programs = _FEW_LARGE_PROGRAMS if name == "added" and room > MAX_ROWS else _FEW_PROGRAMS
    # Heads whose halves no box divides; and small weights, whose programs take fewer rows each.
    while (head_dim > 0 and (head_dim // 2) % (tuning.block_rows // 2) != 0) or (
        tuning.block_rows > 32 and num_weight_rows * num_blocks < tuning.block_rows * least_programs
    ):
        tuning = replace(tuning, block_rows=tuning.block_rows // 2, num_warps=4, triggers_late=True)
    stage_bytes = replace(tuning, num_stages=1).shared_bytes(room)
    num_stages = min(tuning.num_stages, num_steps_of(tuning, num_inputs), (SHARED_BYTES - 1024) // stage_bytes)
    num_programs = -(-num_weight_rows // tuning.block_rows) * num_blocks
    num_for_two = (SHARED_BYTES // 2 - 1024) // stage_bytes
    if num_programs > _MULTIPROCESSORS and num_for_two >= 3 and not (is_normed and room <= MAX_ROWS):
        # A ring that fills a multiprocessor is best where each has one program. Of more than that, two have to fit.
        num_stages = min(num_stages, num_for_two)
    return replace(tuning, num_stages=num_stages)


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
    pdl: bool = False,
) -> torch.Tensor:
    """`tile_rows.tile_rows_linear` for any number of rows, each of which has the same bits whatever the others are."""
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


def invariant_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    is_normed: bool = False,
) -> torch.Tensor:
    """x Wᵀ + bias of `invariant_linear` with nothing around it, [M, out]; is_normed: whether x was normed before."""
    if not x.is_cuda:
        result = few_rows_reference(x, weight, bias=bias)
        return result if out is None else out.copy_(result)
    tuning = tuned(len(x), *weight.shape, is_gated=False, is_normed=is_normed)
    room = room_for(len(x), is_normed=is_normed)
    return tile_rows_linear_triton(x, weight, out, bias=bias, tuning=tuning, room=room)
