"""The Triton kernels of matrix products for few rows; `few_rows.py` launches them. They know one product, no model.

Weights are read once and from memory, so all here serves to keep many of their loads in flight. *Sums* serves one and two rows
on the ordinary cores; *dots* serves up to 16 on the tensor cores; *norm* prepares the rows that *dots* reads.

With `PDL` a kernel is launched before the one in front of it in the stream has ended (programmatic dependent launch). Up to
`gdc_wait` it reads only what no kernel writes: weights. All its programs wait, so whoever waits for it waits for all before.

Names: a weight has N rows of K inputs; a tile is the part of K that is loaded at once; a half is 8 rows, or 8 tokens, as the
tensor cores take them. What is marked tl.constexpr follows from the weight and a launch's table, and from the number of rows
only as far as there are four kernels: for one, for two, for up to 8 and for up to 16.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _active(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activations of `activation.py`, of float32."""
    if ACTIVATION == "silu":
        result = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u; 1.59577 is twice the root of 2/pi.
        result = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        result = tl.where(gate < 0.0, 0.0, gate)  # not a number stays so
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _weight_rows(local: tl.tensor, BLOCK_ROWS: tl.constexpr, DISTANCE: tl.constexpr) -> tl.tensor:
    """The weight's rows of this program. Rows that make a pair, DISTANCE apart, are neighbours here; 0 says that none do."""
    rows = tl.program_id(0) * BLOCK_ROWS + local
    if DISTANCE > 0:
        pairs = rows // 2
        rows = pairs // DISTANCE * (2 * DISTANCE) + pairs % DISTANCE + rows % 2 * DISTANCE
    return rows


@triton.jit  # type: ignore[untyped-decorator]
def _is_row(local: tl.tensor, N: tl.constexpr, BLOCK_ROWS: tl.constexpr) -> tl.tensor:
    """Which of them exist; None says all."""
    is_row = None
    if N % BLOCK_ROWS != 0:
        is_row = tl.program_id(0) * BLOCK_ROWS + local < N
    return is_row


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    out: tl.tensor,
    product: tl.tensor,
    biases: tl.tensor,
    residual: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """product: float32 [BLOCK_TOKENS, BLOCK_ROWS]. Rounds where the kernels do that one after the other would store."""
    dtype = out.dtype.element_ty
    if biases is not None:
        product += biases[None, :].to(tl.float32)
    columns: tl.constexpr = BLOCK_ROWS if ACTIVATION is None else BLOCK_ROWS // 2
    if ACTIVATION is None:
        result = product.to(dtype)
    else:
        gate, up = tl.split(tl.reshape(product.to(dtype).to(tl.float32), (BLOCK_TOKENS, columns, 2)))
        result = (_active(gate, ACTIVATION).to(dtype).to(tl.float32) * up).to(dtype)
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    column = tl.program_id(0) * columns + tl.arange(0, columns)[None, :]
    width: tl.constexpr = N if ACTIVATION is None else N // 2
    place = token * width + column
    mask = (token < num_tokens) & (column < width)
    if residual is not None:
        # `residual` may be `out`: each element is read and written by this program alone.
        result = (result.to(tl.float32) + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(out + place, result, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _load_turns(
    positions: tl.tensor,
    kv_indices: tl.tensor,
    table: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tuple:
    """Of each token and pair of rows the cosine and the sine, [BLOCK_TOKENS, pairs], and of each token its slot."""
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    is_token = token < num_tokens
    pair = tl.program_id(0) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)[None, :]
    line = tl.load(positions + token, mask=is_token, other=0) * HEAD_DIM + pair % half
    slot = tl.load(kv_indices + token, mask=is_token, other=0)
    return tl.load(table + line), tl.load(table + line + half), slot


@triton.jit  # type: ignore[untyped-decorator]
def _store_heads(
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    product: tl.tensor,
    biases: tl.tensor,
    turns: tl.tuple,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Turned queries to `out`, turned keys and values to their slots; rounded as in `rope_kv.py`."""
    half: tl.constexpr = HEAD_DIM // 2
    num_heads: tl.constexpr = N // HEAD_DIM - 2 * NUM_KV_HEADS
    dtype = out.dtype.element_ty
    if biases is not None:
        product += biases[None, :].to(tl.float32)
    first, second = tl.split(tl.reshape(product.to(dtype).to(tl.float32), (BLOCK_TOKENS, BLOCK_ROWS // 2, 2)))
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    pair = tl.program_id(0) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)[None, :]
    head, column = pair // half, pair % half
    cosine, sine = turns[0].to(dtype).to(tl.float32), turns[1].to(dtype).to(tl.float32)
    # The first product is rounded before the second is added, as `apply_rope` does.
    turned_first = (first * cosine).to(dtype).to(tl.float32) - second * sine
    turned_second = (second * cosine).to(dtype).to(tl.float32) + first * sine
    is_turned = head < num_heads + NUM_KV_HEADS
    first = tl.where(is_turned, turned_first, first).to(dtype)
    second = tl.where(is_turned, turned_second, second).to(dtype)
    is_there = (token < num_tokens) & (pair < N // 2)
    kv_place = (turns[2] * NUM_KV_HEADS - num_heads) * HEAD_DIM + column
    # Only one of the three happens for a head.
    is_stored = is_there & (head < num_heads)
    place = out + (token * num_heads + head) * HEAD_DIM + column
    tl.store(place, first, mask=is_stored)
    tl.store(place + half, second, mask=is_stored)
    is_stored = is_there & (head >= num_heads) & is_turned
    place = keys + kv_place + head * HEAD_DIM
    tl.store(place, first, mask=is_stored)
    tl.store(place + half, second, mask=is_stored)
    is_stored = is_there & (head >= num_heads + NUM_KV_HEADS)
    place = values + kv_place + (head - NUM_KV_HEADS) * HEAD_DIM
    tl.store(place, first, mask=is_stored)
    tl.store(place + half, second, mask=is_stored)


@triton.jit  # type: ignore[untyped-decorator]
def _appended(tiles: tl.tuple, tile: tl.tensor) -> tl.tuple:
    return tiles + (tile,)  # noqa: RUF005  # Triton knows no unpacking


@triton.jit  # type: ignore[untyped-decorator]
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
    rows = _weight_rows(local, BLOCK_ROWS, DISTANCE)
    is_row = _is_row(local, N, BLOCK_ROWS)
    places = rows.to(tl.int64) * K
    tiles: tl.tuple = ()
    for tile in tl.static_range(min(AHEAD, num_tiles)):
        tiles = _appended(tiles, _load_rows(weight, places, is_row, tile * TILE, K, TILE))
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
        turns = _load_turns(positions, kv_indices, table, TOKENS, TOKENS, BLOCK_ROWS, HEAD_DIM)
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
            tiles = _appended(tiles, _load_rows(weight, places, is_row, (tile + AHEAD) * TILE, K, TILE))
        if tile + 1 < num_tiles:
            firsts = _appended(firsts, _load_vector(x, (tile + 1) * TILE, K, TILE))
            if TOKENS == 2:
                seconds = _appended(seconds, _load_vector(x + K, (tile + 1) * TILE, K, TILE))
            if norm is not None:
                scales = _appended(scales, _load_vector(norm, (tile + 1) * TILE, K, TILE))
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
        _store_heads(out, keys, values, products, biases, turns, TOKENS, N, TOKENS, BLOCK_ROWS, NUM_KV_HEADS, HEAD_DIM)
    else:
        _store(out, products, biases, residual, TOKENS, N, TOKENS, BLOCK_ROWS, ACTIVATION)


@triton.jit  # type: ignore[untyped-decorator]
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
    is_row = _is_row(local, N, BLOCK_ROWS)
    places = _weight_rows(local, BLOCK_ROWS, DISTANCE).to(tl.int64) * words
    tiles: tl.tuple = ()
    for tile in tl.static_range(AHEAD):
        tiles = _appended(tiles, _load_words(weight, places, is_row, tile * tile_words, words, WARPS, PARTS, True))
    biases = bias
    if bias is not None:
        flat = tl.arange(0, BLOCK_ROWS)
        is_there = _is_row(flat, N, BLOCK_ROWS)
        biases = tl.load(bias + _weight_rows(flat, BLOCK_ROWS, DISTANCE), mask=is_there)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGERS_LATE:
            tl.extra.cuda.gdc_launch_dependents()
    if HEAD_DIM > 0:
        turns = _load_turns(positions, kv_indices, table, num_tokens, 8 * TOKEN_HALVES, BLOCK_ROWS, HEAD_DIM)
    token = half_row + 8 * tl.arange(0, TOKEN_HALVES)[None, None, None, :, None]
    is_token = token < num_tokens
    token_places = token * words
    inputs: tl.tuple = ()
    for tile in tl.static_range(TOKENS_AHEAD):
        inputs = _appended(
            inputs, _load_words(x, token_places, is_token, tile * tile_words, words, WARPS, PARTS, False)
        )
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
            tiles = _appended(tiles[1:], _load_words(weight, places, is_row, next_tile, words, WARPS, PARTS, True))
            next_input = here + TOKENS_AHEAD * tile_words
            inputs = _appended(
                inputs[1:], _load_words(x, token_places, is_token, next_input, words, WARPS, PARTS, False)
            )
    products = tl.trans(tl.sum(summed, axis=0))
    tokens: tl.constexpr = 8 * TOKEN_HALVES
    if HEAD_DIM > 0:
        _store_heads(
            out, keys, values, products, biases, turns, num_tokens, N, tokens, BLOCK_ROWS, NUM_KV_HEADS, HEAD_DIM
        )
    else:
        _store(out, products, biases, residual, num_tokens, N, tokens, BLOCK_ROWS, ACTIVATION)


@triton.jit  # type: ignore[untyped-decorator]
def norm_kernel(
    out: tl.tensor,
    x: tl.tensor,
    norm: tl.tensor,
    epsilon: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`norm.rms_norm`, one program a token, as a link of the chain."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    is_inside = column < K
    scale = tl.load(norm + column, mask=is_inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * K + column
    value = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    quotient = value * tl.rsqrt(tl.sum(value * value, axis=0) / K + epsilon)
    # The product of two 16-bit floats is exact in float32, so this rounds as a product in 16 bits does.
    result = quotient.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + place, result.to(out.dtype.element_ty), mask=is_inside)
