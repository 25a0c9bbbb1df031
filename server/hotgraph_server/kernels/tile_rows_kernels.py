"""The Gluon kernel of matrix products for 9 to 64 rows; `tile_rows.py` launches it. It knows one product, no model.

The weight's tiles come into a ring in shared memory by the bulk copy engine (TMA) and are the M side of `wgmma`; the tokens,
padded to 16, 32 or 64, are its N side and share the ring's stages. So hardly a register is spent on what is in flight.
`invariant_rows.py` has it padded to 8, and to 128 and 256, where blocks of so many tokens have programs of their own.

A result is the sum over all columns, 16 at a time from the first to the last, within each of SPLITS stretches of STEPS steps,
and then the sum of the stretches in their order. So its bits follow from SPLITS and from the columns of a stretch, and not from
how many tokens there are or are room for, nor from the sizes of tiles and of the ring.

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

from hotgraph_server.kernels.few_rows_parts import active as active_of_triton

COLUMNS = ttgl.constexpr(64)
"""Of a tile: 128 bytes, the widest stretch that the copy engine spreads over the banks of shared memory."""

# The same function, for Gluon's compiler.
_active = gluon.jit(active_of_triton.fn)


@gluon.constexpr_function  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _rows_first(num_rows: int, num_tokens: int, num_warps: int) -> ttgl.BlockedLayout:
    """[rows, tokens] with eight neighbouring rows a thread, which are neighbours in the result."""
    lanes = min(num_rows // 8, 32)
    warps = min(num_warps, max(num_tokens * lanes // 32, 1))
    return ttgl.BlockedLayout([8, 1], [lanes, 32 // lanes], [num_warps // warps, warps], [0, 1])


@gluon.constexpr_function  # type: ignore[untyped-decorator]
def _pairs_first(num_pairs: int, num_tokens: int, num_warps: int) -> ttgl.BlockedLayout:
    """[pairs, tokens, 2] alike, both of a pair in one thread."""
    flat = _rows_first(num_pairs, num_tokens, num_warps)
    return ttgl.BlockedLayout(
        [*flat.size_per_thread, 2], [*flat.threads_per_warp, 1], [*flat.warps_per_cta, 1], [2, 0, 1]
    )


@gluon.constexpr_function  # type: ignore[untyped-decorator]
def _stored(num_rows: int, num_tokens: int, num_warps: int, are_pairs: bool) -> ttgl.DistributedLayout:
    """[rows, tokens] as they are stored: of one product, or of what was made of pairs of products."""
    if are_pairs:
        return ttgl.SliceLayout(2, _pairs_first(num_rows, num_tokens, num_warps))
    return _rows_first(num_rows, num_tokens, num_warps)


@gluon.jit  # type: ignore[untyped-decorator]
def _split_pairs(product: ttgl.tensor, num_warps: ttgl.constexpr) -> ttgl.tuple:
    """[2 * pairs, tokens] → twice [pairs, tokens]: the upper half of the rows and the lower."""
    pairs: ttgl.constexpr = product.shape[0] // 2
    tokens: ttgl.constexpr = product.shape[1]
    halves = product.reshape((2, pairs, tokens)).permute((1, 2, 0))
    return ttgl.split(ttgl.convert_layout(halves, _pairs_first(pairs, tokens, num_warps)))


@gluon.jit  # type: ignore[untyped-decorator]
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


@gluon.jit  # type: ignore[untyped-decorator]
def _store_product(
    out: ttgl.tensor,
    product: ttgl.tensor,
    bias: ttgl.tensor,
    residual: ttgl.tensor,
    num_tokens: ttgl.tensor,
    first_token: ttgl.tensor,
    first_row: ttgl.tensor,
    N: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    ACTIVATION: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> None:
    """product: float32 [tile's rows, tokens]. Rounds where the kernels do that one after the other would store."""
    dtype: ttgl.constexpr = out.dtype.element_ty
    tokens: ttgl.constexpr = product.shape[1]
    rows: ttgl.constexpr = product.shape[0] if ACTIVATION is None else product.shape[0] // 2
    width: ttgl.constexpr = N if ACTIVATION is None else N // 2
    layout: ttgl.constexpr = _stored(rows, tokens, num_warps, ACTIVATION is not None)
    local = ttgl.arange(0, rows, layout=ttgl.SliceLayout(1, layout))
    row = first_row + local
    is_row = (local < BOX_ROWS) & (row < width)
    token = first_token + ttgl.arange(0, tokens, layout=ttgl.SliceLayout(0, layout))[None, :]
    place = token * width + row[:, None]
    mask = (token < num_tokens) & is_row[:, None]
    if residual is not None:
        # `residual` may be `out`: each element is read and written by this program alone.
        added = ttgl.load(residual + place, mask=mask, other=0.0).to(ttgl.float32)
    if ACTIVATION is None:
        result = ttgl.convert_layout(product, layout)
        if bias is not None:
            result += ttgl.load(bias + row, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
        result = result.to(dtype)
    else:
        gate, up = _split_pairs(product, num_warps)
        if bias is not None:
            gate += ttgl.load(bias + row, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
            up += ttgl.load(bias + width + row, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
        gate = _active(gate.to(dtype).to(ttgl.float32), ACTIVATION).to(dtype).to(ttgl.float32)
        result = (gate * up.to(dtype).to(ttgl.float32)).to(dtype)
    if residual is not None:
        result = (result.to(ttgl.float32) + added).to(dtype)
    ttgl.store(out + place, result, mask=mask)


@gluon.jit  # type: ignore[untyped-decorator]
def _load_turns(
    positions: ttgl.tensor,
    kv_indices: ttgl.tensor,
    table: ttgl.tensor,
    num_tokens: ttgl.tensor,
    first_token: ttgl.tensor,
    first_column: ttgl.tensor,
    TILE_ROWS: ttgl.constexpr,
    TOKENS: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> ttgl.tuple:
    """Of each pair of rows and token the cosine and the sine, [pairs, TOKENS], and of each token its slot."""
    layout: ttgl.constexpr = _stored(TILE_ROWS // 2, TOKENS, num_warps, True)
    token = first_token + ttgl.arange(0, TOKENS, layout=ttgl.SliceLayout(0, layout))
    is_token = token < num_tokens
    local = ttgl.arange(0, TILE_ROWS // 2, layout=ttgl.SliceLayout(1, layout))
    line = ttgl.load(positions + token, mask=is_token, other=0) * HEAD_DIM + first_column
    place = table + line[None, :] + local[:, None]
    mask = is_token[None, :] & (local < BOX_ROWS)[:, None]
    slot = ttgl.load(kv_indices + token, mask=is_token, other=0)
    cosine = ttgl.load(place, mask=mask, other=0.0)
    return cosine, ttgl.load(place + HEAD_DIM // 2, mask=mask, other=0.0), slot


@gluon.jit  # type: ignore[untyped-decorator]
def _store_heads(
    out: ttgl.tensor,
    keys: ttgl.tensor,
    values: ttgl.tensor,
    product: ttgl.tensor,
    bias: ttgl.tensor,
    turns: ttgl.tuple,
    num_tokens: ttgl.tensor,
    first_token: ttgl.tensor,
    head: ttgl.tensor,
    first_column: ttgl.tensor,
    N: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    NUM_KV_HEADS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> None:
    """Turned queries to `out`, turned keys and values to their slots; rounded as in `rope_kv.py`. All rows are of one head."""
    half: ttgl.constexpr = HEAD_DIM // 2
    pairs: ttgl.constexpr = product.shape[0] // 2
    tokens: ttgl.constexpr = product.shape[1]
    num_heads: ttgl.constexpr = N // HEAD_DIM - 2 * NUM_KV_HEADS
    dtype: ttgl.constexpr = out.dtype.element_ty
    layout: ttgl.constexpr = _stored(pairs, tokens, num_warps, True)
    local = ttgl.arange(0, pairs, layout=ttgl.SliceLayout(1, layout))
    is_row = local < BOX_ROWS
    column = first_column + local
    first, second = _split_pairs(product, num_warps)
    if bias is not None:
        biases = bias + head * HEAD_DIM + column
        first += ttgl.load(biases, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
        second += ttgl.load(biases + half, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
    first = first.to(dtype).to(ttgl.float32)
    second = second.to(dtype).to(ttgl.float32)
    if head < num_heads + NUM_KV_HEADS:
        cosine, sine = turns[0].to(dtype).to(ttgl.float32), turns[1].to(dtype).to(ttgl.float32)
        # The first product is rounded before the second is added, as `apply_rope` does.
        turned_first = (first * cosine).to(dtype).to(ttgl.float32) - second * sine
        second = (second * cosine).to(dtype).to(ttgl.float32) + first * sine
        first = turned_first
    token = first_token + ttgl.arange(0, tokens, layout=ttgl.SliceLayout(0, layout))
    mask = (token < num_tokens)[None, :] & is_row[:, None]
    if head < num_heads:
        place = out + (token * num_heads + head)[None, :] * HEAD_DIM + column[:, None]
        ttgl.store(place, first.to(dtype), mask=mask)
        ttgl.store(place + half, second.to(dtype), mask=mask)
    else:
        line = (turns[2] * NUM_KV_HEADS + (head - num_heads) % NUM_KV_HEADS) * HEAD_DIM
        cache = keys
        if head >= num_heads + NUM_KV_HEADS:
            cache = values
        place = cache + line[None, :] + column[:, None]
        ttgl.store(place, first.to(dtype), mask=mask)
        ttgl.store(place + half, second.to(dtype), mask=mask)


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
    partials: ttgl.tensor,
    arrivals: ttgl.tensor,
    num_tokens: ttgl.tensor,
    N: ttgl.constexpr,
    K: ttgl.constexpr,
    TOKENS: ttgl.constexpr,
    TILE_ROWS: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    PARTS: ttgl.constexpr,
    STAGES: ttgl.constexpr,
    SPLITS: ttgl.constexpr,
    STEPS: ttgl.constexpr,
    ACTIVATION: ttgl.constexpr,
    DISTANCE: ttgl.constexpr,
    NUM_KV_HEADS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    PDL: ttgl.constexpr,
    TRIGGERS_LATE: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> None:
    """A program makes the outputs of one tile's rows for all tokens, from all of K or from one of SPLITS stretches of it.

    A stretch is STEPS steps of PARTS * 64 columns. The grid is (tiles, SPLITS); with room for more than 64 tokens a program has
    one block of them, and the grid is (blocks of tokens, tiles, SPLITS): programs that read the same weight are neighbours.
    x [tokens, K] and weight [N, K] are tensor descriptors. Programs of one tile leave float32 sums in `partials`; the last one
    to arrive there adds them up in the order of K and sets `arrivals` back to 0.
    """
    dtype: ttgl.constexpr = weight.dtype
    num_steps: ttgl.constexpr = STEPS
    boxes: ttgl.constexpr = TILE_ROWS // BOX_ROWS
    box_bytes: ttgl.constexpr = BOX_ROWS * COLUMNS * 2
    stage_bytes: ttgl.constexpr = PARTS * (box_bytes * (2 if DISTANCE > 0 else 1) + TOKENS * COLUMNS * 2)
    if TOKENS <= 64:
        first_token = 0
        block = ttgl.program_id(0)
        meeting = block
        split_number = ttgl.program_id(1)
    else:
        first_token = ttgl.program_id(0) * TOKENS
        block = ttgl.program_id(1)
        meeting = ttgl.program_id(0) * ttgl.num_programs(1) + block
        split_number = ttgl.program_id(2)
    first_step = split_number * num_steps
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
        _request_weight(
            weight, ring, barrier, stage, row, first_step + stage, True, TILE_ROWS, BOX_ROWS, PARTS, DISTANCE
        )
    if PDL:
        tl.extra.cuda.gdc_wait()
        if not TRIGGERS_LATE:
            tl.extra.cuda.gdc_launch_dependents()
    # x was written by ordinary stores, and the copy engine reads it by a way of its own.
    ttgl.inline_asm_elementwise(
        "fence.proxy.async.global; // dummy $0", "=r", [], dtype=ttgl.int32, is_pure=False, pack=1
    )
    for stage in ttgl.static_range(STAGES):
        _request_tokens(x, token_ring, barriers.index(stage), stage, first_token, first_step + stage, True, PARTS)
    if HEAD_DIM > 0:
        turns = _load_turns(
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
        next_step += first_step
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

    is_last_one = True
    if SPLITS > 1:
        # In the order in which the tensor cores leave them: nothing has to change its thread.
        local = ttgl.arange(0, TILE_ROWS, layout=ttgl.SliceLayout(1, layout))[:, None]
        token = ttgl.arange(0, TOKENS, layout=ttgl.SliceLayout(0, layout))[None, :]
        size: ttgl.constexpr = TILE_ROWS * TOKENS
        mine = partials + meeting * (SPLITS * size) + local * TOKENS + token
        ttgl.store(mine + split_number * size, product)
        ttgl.thread_barrier()
        is_last_one = ttgl.atomic_add(arrivals + meeting, 1, sem="acq_rel") == SPLITS - 1
    if is_last_one:
        if SPLITS > 1:
            product = ttgl.load(mine, cache_modifier=".cg")
            for split in range(1, SPLITS):  # rolled up: all parts at once would take too many registers
                product += ttgl.load(mine + split * size, cache_modifier=".cg")
            ttgl.store(arrivals + meeting, 0)
        if HEAD_DIM > 0:
            _store_heads(
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
            _store_product(
                out, product, bias, residual, num_tokens, first_token, row, N, BOX_ROWS, ACTIVATION, num_warps
            )
