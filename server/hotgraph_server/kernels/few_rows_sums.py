"""The Triton kernel of matrix products for one and two rows, on the ordinary cores. Names as in `few_rows_parts.py`."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.few_rows_parts import (
    appended,
    existing_rows,
    load_turns,
    store_heads,
    store_product,
    weight_rows,
)


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _load_rows(
    weight: tl.tensor, places: tl.tensor, is_row: tl.tensor, first: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """[rows, TILE] from column `first` on; 0 from K on."""
    column = first + tl.arange(0, TILE)
    mask = (column < K)[None, :]
    if is_row is not None:
        mask = mask & is_row[:, None]
    return tl.load(weight + places[:, None] + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit  # type: ignore[untyped-decorator]
def _load_vector(source: tl.tensor, first: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """[TILE] from element `first` on; 0 from K on."""
    column = first + tl.arange(0, TILE)
    return tl.load(source + column, mask=column < K, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_eights(values: tl.tensor, ROWS: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """[ROWS, TILE] → [ROWS, TILE / 8]; with ROWS = 0 [TILE] → [TILE / 8]."""
    if ROWS == 0:
        return tl.sum(tl.reshape(values, (TILE // 8, 8)), axis=1)
    else:  # noqa: RET505  # Triton wants the branch that it does not take out of its sight
        return tl.sum(tl.reshape(values, (ROWS, TILE // 8, 8)), axis=2)


@triton.jit  # type: ignore[untyped-decorator]
def sums_kernel(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    norm: tl.tensor,
    residual: tl.tensor,
    positions: tl.tensor,
    kv_indices: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    epsilon: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DISTANCE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PDL: tl.constexpr,
    TRIGGERS_LATE: tl.constexpr,
) -> None:
    """One or two tokens: a program makes the outputs of BLOCK_ROWS rows of the weight, of `AHEAD` tiles requested at a time.

    With `norm` the tokens are normed on the way: their squares are summed beside the products, which are scaled at the end.
    """
    if PDL and not TRIGGERS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles: tl.constexpr = (K + TILE - 1) // TILE
    local = tl.arange(0, BLOCK_ROWS)
    rows = weight_rows(local, BLOCK_ROWS, DISTANCE)
    is_row = existing_rows(local, N, BLOCK_ROWS)
    places = rows.to(tl.int64) * K
    tiles: tl.tuple = ()
    for tile in tl.static_range(min(AHEAD, num_tiles)):
        tiles = appended(tiles, _load_rows(weight, places, is_row, tile * TILE, K, TILE))
    biases = bias
    if bias is not None:
        biases = tl.load(bias + rows, mask=is_row)
    if norm is not None:
        scales: tl.tuple = (_load_vector(norm, 0, K, TILE),)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGERS_LATE:
            tl.extra.cuda.gdc_launch_dependents()
    if HEAD_DIM > 0:
        turns = load_turns(positions, kv_indices, table, TOKENS, TOKENS, BLOCK_ROWS, HEAD_DIM)
    # The second token is there with TOKENS = 2 only; what it needs is left out of the kernel else. Both go the same way.
    firsts: tl.tuple = (_load_vector(x, 0, K, TILE),)
    if TOKENS == 2:
        seconds: tl.tuple = (_load_vector(x + K, 0, K, TILE),)
    # Each thread adds eight neighbours up at once, as many as it loads with 16 bytes, and threads meet only at the end.
    first_sum = tl.zeros([BLOCK_ROWS, TILE // 8], tl.float32)
    second_sum = tl.zeros([BLOCK_ROWS, TILE // 8], tl.float32)
    first_square = tl.zeros([TILE // 8], tl.float32)
    second_square = tl.zeros([TILE // 8], tl.float32)
    for tile in tl.static_range(num_tiles):
        if tile + AHEAD < num_tiles:
            tiles = appended(tiles, _load_rows(weight, places, is_row, (tile + AHEAD) * TILE, K, TILE))
        if tile + 1 < num_tiles:
            firsts = appended(firsts, _load_vector(x, (tile + 1) * TILE, K, TILE))
            if TOKENS == 2:
                seconds = appended(seconds, _load_vector(x + K, (tile + 1) * TILE, K, TILE))
            if norm is not None:
                scales = appended(scales, _load_vector(norm, (tile + 1) * TILE, K, TILE))
        weights = tiles[tile].to(tl.float32)
        value = firsts[tile].to(tl.float32)
        if norm is not None:
            first_square += _sum_eights(value * value, 0, TILE)
            value = value * scales[tile].to(tl.float32)
        first_sum += _sum_eights(weights * value[None, :], BLOCK_ROWS, TILE)
        if TOKENS == 2:
            value = seconds[tile].to(tl.float32)
            if norm is not None:
                second_square += _sum_eights(value * value, 0, TILE)
                value = value * scales[tile].to(tl.float32)
            second_sum += _sum_eights(weights * value[None, :], BLOCK_ROWS, TILE)
    product = tl.sum(first_sum, axis=1)
    if norm is not None:
        product = product * tl.rsqrt(tl.sum(first_square, axis=0) / K + epsilon)
    if TOKENS == 1:
        products = product[None, :]
    else:
        second_product = tl.sum(second_sum, axis=1)
        if norm is not None:
            second_product = second_product * tl.rsqrt(tl.sum(second_square, axis=0) / K + epsilon)
        products = tl.trans(tl.join(product, second_product))
    if HEAD_DIM > 0:
        store_heads(out, keys, values, products, biases, turns, TOKENS, N, TOKENS, BLOCK_ROWS, NUM_KV_HEADS, HEAD_DIM)
    else:
        store_product(out, products, biases, residual, TOKENS, N, TOKENS, BLOCK_ROWS, ACTIVATION)
