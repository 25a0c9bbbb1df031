"""The Triton kernel of matrix products for 3 to 16 rows, on the tensor cores. Names as in `few_rows_parts.py`."""

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
def _load_words(
    source: tl.tensor,
    places: tl.tensor,
    is_row: tl.tensor,
    first: tl.tensor,
    WORDS: tl.constexpr,
    WARPS: tl.constexpr,
    PARTS: tl.constexpr,
    IS_WEIGHT: tl.constexpr,
) -> tl.tensor:
    """Words of two neighbours each, [8 rows, WARPS, PARTS, halves, 16], from word `first` of each row on; 0 from WORDS on.

    In this order of dimensions four lanes read 64 bytes of a row, eight rows a warp, and warps lie behind each other in K: what
    a lane holds is what it hands the tensor core. 16-bit numbers that a loop carries would be taken apart and put together
    each time, so they stay words.
    """
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    part = tl.arange(0, PARTS)[None, None, :, None, None]
    word = first + (warp * PARTS + part) * 16 + tl.arange(0, 16)[None, None, None, None, :]
    mask = word < WORDS
    if is_row is not None:
        mask = mask & is_row
    if IS_WEIGHT:
        result = tl.load(source + places + word, mask=mask, other=0, eviction_policy="evict_first")
    else:
        result = tl.load(source + places + word, mask=mask, other=0)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(
    words: tl.tensor, HALVES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, IS_BFLOAT16: tl.constexpr
) -> tl.tensor:
    """The words' numbers, [8, WARPS, PARTS, halves, lane, 2, 2, 2]; the last three tell a lane's eight numbers apart."""
    dtype: tl.constexpr = tl.bfloat16 if IS_BFLOAT16 else tl.float16
    low = words.to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), (8, WARPS, PARTS, HALVES, 4, 2, 2, 2))


@triton.jit  # type: ignore[untyped-decorator]
def _weight_operand(
    words: tl.tensor, HALVES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, IS_BFLOAT16: tl.constexpr
) -> tl.tensor:
    """[WARPS, rows, K of a warp], K in an order of its own: the one in which no number has to change its lane."""
    numbers = tl.permute(_numbers(words, HALVES, WARPS, PARTS, IS_BFLOAT16), (1, 3, 0, 2, 6, 4, 5, 7))
    return tl.reshape(numbers, (WARPS, HALVES * 8, PARTS * 32))


@triton.jit  # type: ignore[untyped-decorator]
def _token_operand(
    words: tl.tensor, HALVES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, IS_BFLOAT16: tl.constexpr
) -> tl.tensor:
    """[WARPS, K of a warp, tokens], K in the same order."""
    numbers = tl.permute(_numbers(words, HALVES, WARPS, PARTS, IS_BFLOAT16), (1, 2, 6, 4, 5, 7, 3, 0))
    return tl.reshape(numbers, (WARPS, PARTS * 32, HALVES * 8))


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def dots_kernel(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    positions: tl.tensor,
    kv_indices: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    TOKEN_HALVES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    TOKENS_AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DISTANCE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    PDL: tl.constexpr,
    TRIGGERS_LATE: tl.constexpr,
) -> None:
    """Up to 8 * TOKEN_HALVES tokens: a program makes the outputs of BLOCK_ROWS rows, of `AHEAD` tiles requested at a time.

    x and weight are given as int32, two numbers a word. The warps share K and add up what they have at the end, in order. No
    number goes through shared memory before that.
    """
    if PDL and not TRIGGERS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    words: tl.constexpr = K // 2
    tile_words: tl.constexpr = 16 * PARTS * WARPS  # words
    halves: tl.constexpr = BLOCK_ROWS // 8
    half_row = tl.arange(0, 8)[:, None, None, None, None]
    local = half_row + 8 * tl.arange(0, halves)[None, None, None, :, None]
    is_row = existing_rows(local, N, BLOCK_ROWS)
    places = weight_rows(local, BLOCK_ROWS, DISTANCE).to(tl.int64) * words
    tiles: tl.tuple = ()
    for tile in tl.static_range(AHEAD):
        tiles = appended(tiles, _load_words(weight, places, is_row, tile * tile_words, words, WARPS, PARTS, True))
    biases = bias
    if bias is not None:
        flat = tl.arange(0, BLOCK_ROWS)
        is_there = existing_rows(flat, N, BLOCK_ROWS)
        biases = tl.load(bias + weight_rows(flat, BLOCK_ROWS, DISTANCE), mask=is_there)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGERS_LATE:
            tl.extra.cuda.gdc_launch_dependents()
    if HEAD_DIM > 0:
        turns = load_turns(positions, kv_indices, table, num_tokens, 8 * TOKEN_HALVES, BLOCK_ROWS, HEAD_DIM)
    token = half_row + 8 * tl.arange(0, TOKEN_HALVES)[None, None, None, :, None]
    is_token = token < num_tokens
    token_places = token * words
    inputs: tl.tuple = ()
    for tile in tl.static_range(TOKENS_AHEAD):
        inputs = appended(inputs, _load_words(x, token_places, is_token, tile * tile_words, words, WARPS, PARTS, False))
    summed = tl.zeros([WARPS, BLOCK_ROWS, 8 * TOKEN_HALVES], tl.float32)
    for first in range(0, words, tile_words * AHEAD):
        for tile in tl.static_range(AHEAD):
            here = first + tile * tile_words
            summed = tl.dot(
                _weight_operand(tiles[0], halves, WARPS, PARTS, IS_BFLOAT16),
                _token_operand(inputs[0], TOKEN_HALVES, WARPS, PARTS, IS_BFLOAT16),
                summed,
            )
            next_tile = here + AHEAD * tile_words
            tiles = appended(tiles[1:], _load_words(weight, places, is_row, next_tile, words, WARPS, PARTS, True))
            next_input = here + TOKENS_AHEAD * tile_words
            inputs = appended(
                inputs[1:], _load_words(x, token_places, is_token, next_input, words, WARPS, PARTS, False)
            )
    products = tl.trans(tl.sum(summed, axis=0))
    tokens: tl.constexpr = 8 * TOKEN_HALVES
    if HEAD_DIM > 0:
        store_heads(
            out, keys, values, products, biases, turns, num_tokens, N, tokens, BLOCK_ROWS, NUM_KV_HEADS, HEAD_DIM
        )
    else:
        store_product(out, products, biases, residual, num_tokens, N, tokens, BLOCK_ROWS, ACTIVATION)
