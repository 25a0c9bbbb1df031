"""The Gluon kernel of matrix products in one order; `tile_rows.py` launches it. It knows one product, no model.

The weight's tiles come into a ring in shared memory by the bulk copy engine (TMA) and are the M side of `wgmma`; the tokens,
padded to a power of two from 8 to 256, are its N side and share the ring's stages. So hardly a register is spent on what is in
flight. Of more tokens than there is room for, blocks have programs of their own.

A result is the sum over all columns, 16 at a time from the first to the last. So its bits do not depend on how many tokens
there are or are room for, nor on the sizes of tiles and of the ring.

With `PDL` a kernel is launched before the one in front of it in the stream has ended (programmatic dependent launch). Up to
`gdc_wait` it requests only what no kernel writes: the ring's first tiles of the weight. All its programs wait, so whoever waits
for it waits for all before.

Names: a weight has N rows of K inputs; a box is what one request brings, BOX_ROWS rows of 64 columns; a tile is TILE_ROWS rows
of 64 columns, as the tensor cores take it, in one box or in two that fill its halves, or as much of them as they can; a stage
of the ring is PARTS tiles of the weight and as many of x. What is marked constexpr follows from the weight, the tuning and
which power of two of tokens there is room for, never from a number of rows.

Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "cp.async.bulk.tensor"; CUDA programming guide,
"Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import triton.language as tl  # type: ignore[import-untyped]  # it comes without types
from triton.experimental import gluon  # type: ignore[import-untyped]  # as above
from triton.experimental.gluon import language as ttgl  # type: ignore[import-untyped]  # as above
from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[import-untyped]  # as above
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hotgraph_server.kernels.tile_rows_parts import load_turns, store_heads, store_product

COLUMNS = ttgl.constexpr(64)
"""Of a tile: 128 bytes, the widest stretch that the copy engine spreads over the banks of shared memory."""


@gluon.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _request_weight(
    source: ttgl.tensor,
    ring: ttgl.tensor,
    barrier: ttgl.tensor,
    stage: ttgl.tensor,
    row: ttgl.tensor,
    step: ttgl.tensor,
    is_wanted: ttgl.tensor,
    TILE_ROWS: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    PARTS: ttgl.constexpr,
    DISTANCE: ttgl.constexpr,
) -> None:
    """Step `step`'s tiles into stage `stage`: rows from `row` on, and with DISTANCE as many from DISTANCE rows further on."""
    boxes: ttgl.constexpr = TILE_ROWS // BOX_ROWS
    for part in ttgl.static_range(PARTS):
        tile = stage * PARTS + part
        column = (step * PARTS + part) * COLUMNS
        tma.async_copy_global_to_shared(source, [row, column], barrier, ring.index(tile * boxes), is_wanted)
        if DISTANCE > 0:
            second = ring.index(tile * boxes + boxes // 2)
            tma.async_copy_global_to_shared(source, [row + DISTANCE, column], barrier, second, is_wanted)


@gluon.jit  # type: ignore[untyped-decorator]
def _request_tokens(
    source: ttgl.tensor,
    ring: ttgl.tensor,
    barrier: ttgl.tensor,
    stage: ttgl.tensor,
    first_token: ttgl.tensor,
    step: ttgl.tensor,
    is_wanted: ttgl.tensor,
    PARTS: ttgl.constexpr,
) -> None:
    """Step `step`'s columns of the block's tokens into stage `stage`; there are zeros for tokens that do not exist."""
    for part in ttgl.static_range(PARTS):
        column = (step * PARTS + part) * COLUMNS
        tma.async_copy_global_to_shared(
            source, [first_token, column], barrier, ring.index(stage * PARTS + part), is_wanted
        )


@gluon.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def tiles_kernel(
    out: ttgl.tensor,
    x: ttgl.tensor,
    weight: ttgl.tensor,
    bias: ttgl.tensor,
    residual: ttgl.tensor,
    positions: ttgl.tensor,
    kv_indices: ttgl.tensor,
    table: ttgl.tensor,
    keys: ttgl.tensor,
    values: ttgl.tensor,
    num_tokens: ttgl.tensor,
    N: ttgl.constexpr,
    K: ttgl.constexpr,
    TOKENS: ttgl.constexpr,
    TILE_ROWS: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    PARTS: ttgl.constexpr,
    STAGES: ttgl.constexpr,
    STEPS: ttgl.constexpr,
    ACTIVATION: ttgl.constexpr,
    DISTANCE: ttgl.constexpr,
    NUM_KV_HEADS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    PDL: ttgl.constexpr,
    TRIGGERS_LATE: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> None:
    """A program makes the outputs of one tile's rows for all tokens, from all of K in STEPS steps of PARTS * 64 columns.

    The grid is (tiles,); with room for more than 64 tokens a program has one block of them, and the grid is (blocks of tokens,
    tiles): programs that read the same weight are neighbours. x [tokens, K] and weight [N, K] are tensor descriptors.
    """
    dtype: ttgl.constexpr = weight.dtype
    num_steps: ttgl.constexpr = STEPS
    boxes: ttgl.constexpr = TILE_ROWS // BOX_ROWS
    box_bytes: ttgl.constexpr = BOX_ROWS * COLUMNS * 2
    stage_bytes: ttgl.constexpr = PARTS * (box_bytes * (2 if DISTANCE > 0 else 1) + TOKENS * COLUMNS * 2)
    if TOKENS <= 64:
        first_token = 0
        block = ttgl.program_id(0)
    else:
        first_token = ttgl.program_id(0) * TOKENS
        block = ttgl.program_id(1)
    row = block * BOX_ROWS
    if HEAD_DIM > 0:
        ttgl.static_assert(DISTANCE % BOX_ROWS == 0)
        head = block // (DISTANCE // BOX_ROWS)
        first_column = block % (DISTANCE // BOX_ROWS) * BOX_ROWS
        row = head * HEAD_DIM + first_column

    # What the copy engine is told of x, the second argument, is fetched now and not when the first of x is waited for.
    ttgl.inline_asm_elementwise(
        "prefetch.param.tensormap [tiles_kernel_param_1]; // dummy $0",
        "=r",
        [],
        dtype=ttgl.int32,
        is_pure=False,
        pack=1,
    )
    ring = ttgl.allocate_shared_memory(dtype, [STAGES * PARTS * boxes, BOX_ROWS, COLUMNS], weight.layout)
    tiles = ring._reinterpret(dtype, [STAGES * PARTS, TILE_ROWS, COLUMNS], weight.layout)
    token_ring = ttgl.allocate_shared_memory(dtype, [STAGES * PARTS, TOKENS, COLUMNS], x.layout)
    barriers = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in ttgl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=1)
    fence_async_shared()
    for stage in ttgl.static_range(STAGES):
        barrier = barriers.index(stage)
        mbarrier.expect(barrier, stage_bytes)
        _request_weight(weight, ring, barrier, stage, row, stage, True, TILE_ROWS, BOX_ROWS, PARTS, DISTANCE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if not TRIGGERS_LATE:
            tl.extra.cuda.gdc_launch_dependents()
    # x was written by ordinary stores, and the copy engine reads it by a way of its own.
    ttgl.inline_asm_elementwise(
        "fence.proxy.async.global; // dummy $0", "=r", [], dtype=ttgl.int32, is_pure=False, pack=1
    )
    for stage in ttgl.static_range(STAGES):
        _request_tokens(x, token_ring, barriers.index(stage), stage, first_token, stage, True, PARTS)
    if HEAD_DIM > 0:
        turns = load_turns(
            positions,
            kv_indices,
            table,
            num_tokens,
            first_token,
            first_column,
            TILE_ROWS,
            TOKENS,
            BOX_ROWS,
            HEAD_DIM,
            num_warps,
        )

    layout: ttgl.constexpr = ttgl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    product = ttgl.zeros([TILE_ROWS, TOKENS], ttgl.float32, layout)
    stage = 0
    phase = 0
    for step in range(num_steps):
        mbarrier.wait(barriers.index(stage), phase)
        for part in ttgl.static_range(PARTS):
            tile = stage * PARTS + part
            tokens = token_ring.index(tile).permute((1, 0))
            product = warpgroup_mma(tiles.index(tile), tokens, product, is_async=True)
        # The products of the step before are done now, and so its stage is free: in all warps, as they meet at its barrier.
        product = warpgroup_mma_wait(PARTS, deps=[product])
        freed = ttgl.where(stage == 0, STAGES - 1, stage - 1)
        next_step = step - 1 + STAGES
        is_wanted = (step > 0) & (next_step < num_steps)
        barrier = barriers.index(freed)
        mbarrier.expect(barrier, stage_bytes, is_wanted)
        _request_weight(weight, ring, barrier, freed, row, next_step, is_wanted, TILE_ROWS, BOX_ROWS, PARTS, DISTANCE)
        _request_tokens(x, token_ring, barrier, freed, first_token, next_step, is_wanted, PARTS)
        is_last = stage == STAGES - 1
        stage = ttgl.where(is_last, 0, stage + 1)
        phase = phase ^ is_last.to(ttgl.int32)
    if PDL and TRIGGERS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    product = warpgroup_mma_wait(0, deps=[product])
    # What changes its thread below goes through memory that was the ring's: not before every warp is done with that.
    ttgl.thread_barrier()
    barriers._keep_alive()

    if HEAD_DIM > 0:
        store_heads(
            out,
            keys,
            values,
            product,
            bias,
            turns,
            num_tokens,
            first_token,
            head,
            first_column,
            N,
            BOX_ROWS,
            NUM_KV_HEADS,
            HEAD_DIM,
            num_warps,
        )
    else:
        store_product(out, product, bias, residual, num_tokens, first_token, row, N, BOX_ROWS, ACTIVATION, num_warps)
